"""Models inside others: parts that are wrapped, modules that hold models, and models that hold smaller ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hf_elsewhere import vision
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText

import tensormix
from tensormix.models import load_model
from tensormix.plan import Plan
from tensormix.sites.locate import uncompiled
from zoo import make, token_ids

SMALL = Plan.model_validate([{"method": {"name": "svd", "keep": 0.5}}])
DROP = Plan.model_validate([{"blocks": "1", "method": {"name": "drop_blocks"}}])


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def wrap(model: Any, part: str) -> None:
    """Wrap the part of this name, and what is around it if it is `both`."""
    if part in ("block", "both"):
        model.model.layers[1] = compiled(model.model.layers[1])
    if part in ("decoder", "both"):
        model.model = compiled(model.model)
    if part == "parallel":
        model.model.layers[1].mlp = nn.DataParallel(model.model.layers[1].mlp)


@pytest.mark.parametrize(("part", "plan"), [("block", SMALL), ("both", SMALL), ("parallel", SMALL), ("block", DROP)])
@torch.no_grad()
def test_a_part_that_is_wrapped_is_compressed_and_saved_under_its_own_names(part, plan, tmp_path):
    plain, model, x = make("llama"), make("llama"), token_ids()
    wrap(model, part)
    model(x)  # what was compiled before must not be what is called afterwards
    rows = tensormix.compress(model, plan, [x])
    assert [row["site"] for row in rows] == [row["site"] for row in tensormix.compress(plain, plan, [x])]
    torch.testing.assert_close(model(x).logits, plain(x).logits)
    assert any("_orig_mod." in name or ".module." in name for name in model.state_dict()) != (plan is DROP)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(x).logits, plain(x).logits)
    torch._dynamo.reset()


def test_wrappers_are_put_back_but_around_what_is_there_no_more():
    model = make("llama")
    wrap(model, "both")
    decoder, layers = model.model, model.model._orig_mod.layers
    with pytest.raises(RuntimeError), uncompiled(model) as is_wrapped:
        assert is_wrapped and model.model is decoder._orig_mod and model.model.layers is layers
        assert not any("_orig_mod" in name for name, _ in model.named_modules())
        raise RuntimeError
    assert model.model is decoder and hasattr(layers[1], "_orig_mod")
    new = nn.Identity()
    with uncompiled(model):
        layers[1] = new
    assert model.model is decoder and layers[1] is new
    with uncompiled(make("llama")) as is_wrapped:
        assert not is_wrapped


class Holder(nn.Module):
    """A module of another library with models in it."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(models)


@torch.no_grad()
def test_a_model_in_a_module_of_another_library_saves_its_operators(tmp_path):
    holder, x = Holder(make("llama")), token_ids()
    assert tensormix.compress(holder, SMALL)
    holder.encoders[0].save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(x).logits, holder.encoders[0](x).logits)


@pytest.mark.parametrize("loaded", [False, True], ids=["compressed", "loaded"])
@torch.no_grad()
def test_the_bare_model_inside_is_saved_by_itself(loaded, tmp_path):
    model, x = make("llama"), token_ids()
    tensormix.compress(model, SMALL)
    wanted = model.model(x)[0]
    if loaded:
        model.save_pretrained(tmp_path / "whole")
        model = load_model(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "bare")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare").eval()(x)[0], wanted)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again").model(x)[0], wanted)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_text_model_of_a_model_of_images_is_saved_by_itself(kind, tmp_path):
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(vision(kind)).eval()
    tensormix.compress(model, SMALL)
    x = token_ids().clamp(min=10)
    inner = model.model.language_model
    wanted, whole = inner(input_ids=x)[0], model(input_ids=x).logits
    inner.save_pretrained(tmp_path / "text")
    again = type(inner).from_pretrained(tmp_path / "text").eval()
    assert torch.equal(again(input_ids=x)[0], wanted)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(type(model).from_pretrained(tmp_path / "whole").eval()(input_ids=x).logits, whole)


def tied() -> Any:
    """A model that says, as those of transformers do, that a matrix is there twice."""
    model: Any = make("llama")
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    model.all_tied_weights_keys = {down: up}
    return model


@pytest.mark.parametrize("block", [1, 2])
def test_a_matrix_that_is_tied_to_another_is_refused_by_its_name(block):
    model = tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan.model_validate([{"blocks": str(block), "method": {"name": "svd", "keep": 0.5}}])
    with pytest.raises(ValueError, match=rf"layers.{block}.mlp.up_proj: .* ties .* to .*layers.{3 - block}.*`sites`"):
        tensormix.compress(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    dropped = Plan.model_validate([{"blocks": str(block), "method": {"name": "drop_blocks"}}])
    with pytest.raises(ValueError, match=rf"layers.{block}: .* ties .*layers.{block}.mlp.up_proj.*`blocks`"):
        tensormix.compress(model, dropped)
    other = Plan.model_validate([{"sites": ".*down_proj", "method": {"name": "svd", "keep": 0.5}}])
    assert len(tensormix.compress(model, other)) == 4
