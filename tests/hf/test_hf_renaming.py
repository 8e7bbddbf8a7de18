"""Families whose tensors lie on disk under other names: those of operators are found, whichever class reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

import tensormix
from tensormix.hf.renaming import own_names
from tensormix.models import load_model
from tensormix.plan import Plan
from tensormix.sites import locate_blocks
from zoo import make, token_ids

TOOL = Path(__file__).parents[2] / "tools" / "families"
SMALL = Plan.model_validate([{"method": {"name": "svd", "keep": 0.6}}])


@pytest.fixture
def tiny(monkeypatch) -> Any:
    """Makes the tiny model of a kind and a class."""
    monkeypatch.syspath_prepend(str(TOOL))
    from configs import every_class

    def make_one(kind: str, name: str) -> Any:
        return next(one for one in every_class() if (one.kind, one.class_name) == (kind, name)).make()

    return make_one


def hidden(model: Any) -> torch.Tensor:
    return getattr(model, "base_model", model)(input_ids=token_ids().clamp(min=10), use_cache=False)[0]


@pytest.mark.parametrize(
    ("kind", "name"), [("inkling2_text", "Inkling2ForCausalLM"), ("mixtral", "MixtralForCausalLM")]
)
@torch.no_grad()
def test_what_is_renamed_on_disk_comes_back(kind, name, tiny, tmp_path):
    model = tiny(kind, name)
    model.save_pretrained(tmp_path / "dense")
    tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", SMALL)
    tensormix.compress(model, SMALL)
    model.save_pretrained(tmp_path / "saved")
    wanted = hidden(model)
    for folder in ("saved", "streamed"):
        for cls in (AutoModelForCausalLM, AutoModel):
            again, report = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
            torch.testing.assert_close(hidden(again.eval()), wanted, atol=1e-5, rtol=1e-5)
            assert not report["missing_keys"] and not report["mismatched_keys"]
        torch.testing.assert_close(hidden(load_model(tmp_path / folder)), wanted, atol=1e-5, rtol=1e-5)
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(hidden(AutoModel.from_pretrained(tmp_path / "again").eval()), wanted)


@pytest.mark.parametrize("roles", [["q"], ["q", "k", "v", "gate", "up"]], ids=["one", "all"])
@torch.no_grad()
def test_what_files_hold_in_one_tensor_lies_apart_where_a_part_is_replaced(roles, tiny, tmp_path):
    """q, k and v, and gate and up, are one tensor in the files of this family."""
    model = tiny("molmo2", "Molmo2ForConditionalGeneration")
    plan = Plan.model_validate([{"blocks": "1", "sites": roles, "method": {"name": "svd", "keep": 0.6}}])
    model.save_pretrained(tmp_path / "dense")
    tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", plan)
    tensormix.compress(model, plan)
    model.save_pretrained(tmp_path / "saved")
    for folder in ("saved", "streamed"):
        again, report = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        torch.testing.assert_close(hidden(again.eval()), hidden(model), atol=1e-5, rtol=1e-5)
        assert not any(report.values())
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(hidden(type(model).from_pretrained(tmp_path / "again").eval()), hidden(again))


@torch.no_grad()
def test_a_streamed_model_of_images_is_read_as_its_text_model(tiny, tmp_path):
    """Operators lie where the dense tensors beside them lie, so that the rules of the other class find both."""
    model, x = tiny("mllama", "MllamaForConditionalGeneration"), token_ids().clamp(min=10)
    model.save_pretrained(tmp_path / "dense")
    rows = tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "small", SMALL)
    whole = type(model).from_pretrained(tmp_path / "small").eval()
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert rows and type(text) is transformers.MllamaForCausalLM
    assert torch.equal(text(input_ids=x).logits, whole(input_ids=x).logits)


@pytest.mark.parametrize(("kind", "name"), [("jamba", "JambaForCausalLM"), ("falcon_mamba", "FalconMambaForCausalLM")])
@torch.no_grad()
def test_blocks_that_ask_whether_they_are_quantized_rest_on_disk(kind, name, tiny, tmp_path):
    """They ask whether the config has the field at all, and then read weights past the layer that would bring them."""
    model = tiny(kind, name)
    tensormix.compress(model, Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.6}}]))
    model.save_pretrained(tmp_path / "small")
    root, layers = locate_blocks(model)
    places = {f"{root}.{index}": "disk" for index in range(len(layers))}
    base, _, blocks = root.rpartition(".")
    places |= {f"{base}.{child}": "cpu" for child, _ in model.get_submodule(base).named_children() if child != blocks}
    places |= {child: "cpu" for child, _ in model.named_children() if child != base}
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", device_map=places, offload_folder=str(tmp_path / "away")
    ).eval()
    torch.testing.assert_close(hidden(away), hidden(model), atol=1e-5, rtol=1e-5)
    assert not hasattr(away.config, "_is_quantized")


def test_names_that_a_rule_for_dense_tensors_hits_are_given_back():
    model = make("llama")
    tensormix.compress(model, Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.5}}]))
    rule = WeightRenaming("up_proj.left", "gate.left")
    (back,) = own_names(model, [rule])
    own = "model.layers.1.mlp.up_proj.left"
    for name in (own, own.removeprefix("model.")):
        renamed, _ = rule.rename_source_key(name)
        assert renamed != name and back.rename_source_key(renamed) == (name, renamed)
        assert back.reverse_transform().rename_source_key(name) == (renamed, name)
    assert back.rename_source_key("model.norm.weight") == ("model.norm.weight", None)
    assert own_names(model, []) == [] and own_names(make("llama"), [rule]) == []
    assert own_names(model, [WeightRenaming("vision", "visual")]) == []
