"""Compressed checkpoints are read where dense ones are: as other classes, compiled before, and away from memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

import tensormix
import tensormix.hf
from tensormix.models import load_model
from tensormix.plan import Plan
from zoo import make, token_ids

SMALL = Plan.model_validate([{"method": {"name": "svd", "keep": 0.5}}])
EXACT = Plan.model_validate([{"method": {"name": "mixt", "num_branches": 1}}])
CLASSES = {"causal": AutoModelForCausalLM, "bare": AutoModel, "classifier": AutoModelForSequenceClassification}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("written", ["causal", "bare"])
@pytest.mark.parametrize("read", CLASSES)
@torch.no_grad()
def test_it_is_read_as_another_class(tmp_path, family, written, read):
    make(family).save_pretrained(tmp_path / "dense")
    model = CLASSES[written].from_pretrained(tmp_path / "dense").eval()
    tensormix.compress(model, SMALL)
    model.save_pretrained(tmp_path / "small")
    again = CLASSES[read].from_pretrained(tmp_path / "small").eval()
    x = token_ids()
    wanted = model.base_model(x, use_cache=False)[0]
    assert torch.equal(again.base_model(x, use_cache=False)[0], wanted)


@torch.no_grad()
def test_what_was_fitted_to_several_is_found_there_too(tmp_path):
    model = make("llama")
    rule = {"name": "streamline", "count": 2, "steps": 2}
    tensormix.compress(model, Plan.model_validate([{"blocks": "0-2", "method": rule}]), [token_ids()])
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(token_ids())[0], model.base_model(token_ids())[0])


@torch.no_grad()
def test_a_compiled_model_is_compressed_and_read_as_any_other(tmp_path):
    model = torch.compile(make("llama"), backend="eager")
    rows = tensormix.compress(model, SMALL, [token_ids()])  # type: ignore[arg-type]
    assert rows and not any("_orig_mod" in row["site"] for row in rows)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(token_ids()).logits, model._orig_mod(token_ids()).logits)


def vision(kind: str) -> Any:
    """A tiny model of text and images of this family."""
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
             "patch_size": 4}  # fmt: skip
    if kind == "qwen3_5":
        linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
        text |= {**linear, "rope_parameters": rope}
        tower |= {"num_position_embeddings": 16}
    if kind == "qwen2_5_vl":
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        tower |= {"fullatt_block_indexes": [0]}
    if kind == "llava":
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
                 "image_size": 8, "patch_size": 4}  # fmt: skip
        return CONFIG_MAPPING[kind](
            text_config={**text, "model_type": "llama"}, vision_config={**sizes, "model_type": "clip_vision_model"},
            image_token_index=6,
        )  # fmt: skip
    return CONFIG_MAPPING[kind](text_config=text, vision_config=tower, image_token_id=6, video_token_id=7)


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen2_5_vl", "llava"])
@torch.no_grad()
def test_a_model_of_images_keeps_its_vision_and_its_class(tmp_path, kind):
    torch.manual_seed(0)
    dense = AutoModelForImageTextToText.from_config(vision(kind)).eval()
    dense.save_pretrained(tmp_path / "dense")
    rows = tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "small", EXACT)
    assert rows and all("visual" not in row["site"] and "vision" not in row["site"] for row in rows)
    named = json.loads((tmp_path / "small/config.json").read_text())["architectures"]
    assert named == [type(dense).__name__]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "small").eval()
    x = token_ids().clamp(min=10)
    torch.testing.assert_close(again(input_ids=x).logits, dense(input_ids=x).logits, atol=1e-5, rtol=0)
    tower = {n: p for n, p in dense.named_parameters() if "visual" in n or "vision" in n}
    assert tower and all(torch.equal(again.get_parameter(name), value) for name, value in tower.items())
    in_memory = load_model(tmp_path / "dense")
    assert type(in_memory) is type(dense)
    tensormix.compress(in_memory, EXACT)
    assert torch.equal(in_memory(input_ids=x).logits, again(input_ids=x).logits)


AWAY = [
    {"name": "flat_llm", "keep": 0.75}, {"name": "narrow", "keep": 0.75}, {"name": "sola", "keep": 0.75},
    {"name": "hassle_free", "keep": 0.6, "low_rank_share": 0.3, "steps": 2}, {"name": "svd", "keep": 0.5},
    {"name": "mixt_chain", "num_branches": 2, "steps": 2}, {"name": "mixt_rotated", "num_branches": 2, "steps": 2},
    {"name": "rtn", "bits": 4, "group": 8}, {"name": "rtn", "bits": 8, "of": {"name": "svd", "keep": 0.5}},
    {"name": "mixt_low_rank", "keep": 0.6, "num_branches": 2, "rounds": 2},
    {"name": "monarch", "keep": 0.5, "steps": 2},
    {"name": "mixt_sparse", "keep": 0.7, "num_branches": 2, "rounds": 2}, {"name": "mean_output"},
    {"name": "dobi_svd", "keep": 0.5, "storage": "remapped"}, {"name": "tucker_heads", "keep": 0.5},
    {"name": "trawl", "keep": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("method", AWAY, ids=lambda method: method["name"])
@torch.no_grad()
def test_logits_do_not_depend_on_where_the_weights_rest(tmp_path, method):
    check_away(tmp_path, "llama", method)


@pytest.mark.parametrize("method", [AWAY[7], AWAY[8], {"name": "dobi_svd", "keep": 0.5, "storage": "remapped"}])
@torch.no_grad()
def test_integers_rest_on_disk_too_if_that_is_asked_for(tmp_path, method):
    check_away(tmp_path, "llama", method, offload_buffers=True)


@pytest.mark.parametrize("method", [
    {"name": "td_moe", "keep": 0.5}, {"name": "mobe", "keep": 0.6, "num_bases": 2}, {"name": "svd", "keep": 0.5},
    {"name": "hassle_free", "keep": 0.6, "low_rank_share": 0.3, "steps": 2},
], ids=lambda method: method["name"])  # fmt: skip
@torch.no_grad()
def test_logits_of_experts_do_not_either(tmp_path, method):
    check_away(tmp_path, "qwen3_moe", method)


def check_away(folder: Any, family: str, method: dict[str, Any], **options: Any) -> None:
    """Half of the blocks on disk, and loaded by accelerate when they are called."""
    model, x = make(family), token_ids(rows=4)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    tensormix.compress(model, Plan.model_validate([{"method": method}]), [x])
    model.save_pretrained(folder / "small")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" if index < 2 else "disk" for index in range(4)}
    away = AutoModelForCausalLM.from_pretrained(
        folder / "small", device_map=places, offload_folder=str(folder / "away"), **options
    ).eval()
    here = load_model(folder / "small")
    torch.testing.assert_close(away(x).logits, here(x).logits, atol=1e-5, rtol=1e-5)
