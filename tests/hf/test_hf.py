"""What is saved is what is loaded."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tensormix.hf
from tensormix.compression import compress
from tensormix.operators import StructuredLinear
from tensormix.plan import Plan
from tensormix.sites import blocks
from zoo import ZOO, load_saved, logits, make, token_ids

# One block of each kind of operator, and a constant where most families have no bias.
MIXED = Plan.model_validate(
    [
        {"blocks": "0", "method": {"name": "mixt", "num_branches": 3}},
        {"blocks": "1", "method": {"name": "mean_output"}},
        {"blocks": "2", "method": {"name": "drop_blocks"}},
        {"blocks": "3", "sites": ["o", "down"], "method": {"name": "svd", "keep": 0.5}},
    ]
)
LINEAR = Plan.model_validate(
    [
        {"blocks": "0-1", "method": {"name": "mixt", "num_branches": 2}},
        {"blocks": "2", "method": {"name": "svd", "keep": 0.5}},
    ]
)


def compressed(family, plan=MIXED):
    model = make(family)
    compress(model, plan, [token_ids()])
    return model


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_reload_is_bit_equal(family, shard, tmp_path):
    model = compressed(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    again = load_saved(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert not again.is_quantized and not again.training


def test_twice_around_is_bit_equal(tmp_path):
    model = compressed("gpt2")
    model.save_pretrained(tmp_path / "once")
    load_saved(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load_saved(tmp_path / "twice")), logits(model))
    once, twice = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice"))
    assert once["quantization_config"] == twice["quantization_config"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bf16(family, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    model = load_saved(tmp_path / "dense", dtype=torch.bfloat16)
    compress(model, MIXED, [token_ids()])
    model.save_pretrained(tmp_path / "small")
    again = load_saved(tmp_path / "small", dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(model))
    assert {p.dtype for p in load_saved(tmp_path / "small", dtype=torch.float32).parameters()} == {torch.float32}


def test_tied_embeddings(tmp_path):
    model = compressed("qwen3")
    model.save_pretrained(tmp_path)
    again = load_saved(tmp_path)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(logits(again), logits(model))


def test_both_calls_of_compress_are_saved(tmp_path):
    model = make("llama")
    compress(model, Plan.model_validate([{"blocks": "0", "method": {"name": "svd", "keep": 0.5}}]))
    compress(model, Plan.model_validate([{"blocks": "1", "method": {"name": "zero"}}]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_saved(tmp_path)), logits(model))


def test_a_loaded_model_can_be_compressed_further(tmp_path):
    compressed("llama").save_pretrained(tmp_path / "once")
    model = load_saved(tmp_path / "once")
    compress(model, Plan.model_validate([{"blocks": "3", "method": {"name": "zero"}}]))
    model.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load_saved(tmp_path / "twice")), logits(model))


def test_the_config_holds_specs():
    entries = compressed("llama").config.quantization_config.to_dict()
    assert sorted(entries) == ["format_version", "operators", "quant_method"]
    assert entries["operators"]["model.layers.3.mlp.down_proj"] == {
        "operator": "LowRank", "in_features": 48, "out_features": 32, "rank": 9, "bias": False
    }  # fmt: skip
    assert entries["operators"]["model.layers.1.mlp.down_proj"]["bias"] is True
    json.dumps(entries)


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("dropped", [0, 1])
def test_generation_with_and_without_cache_agrees(family, dropped, tmp_path):
    """Also where the dropped block is the one that the model asks for lengths, and with padding on the left."""
    model = make(family)
    rules = [
        {"blocks": dropped, "method": {"name": "drop_blocks"}},
        {"blocks": 2, "method": {"name": "mixt", "num_branches": 2}},
    ]
    compress(model, Plan.model_validate(rules))
    model.save_pretrained(tmp_path)
    model = load_saved(tmp_path)
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    cached = model.generate(ids, use_cache=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_hidden_states_of_dropped_blocks_are_there(family, tmp_path):
    model = compressed(family)
    model.save_pretrained(tmp_path)
    for one in (model, load_saved(tmp_path), copy.deepcopy(model)):
        states = one(token_ids(), output_hidden_states=True).hidden_states
        assert len(states) == 5
        assert torch.equal(states[2], states[3])  # block 2 is dropped


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_dequantize_gives_dense_layers(family, tmp_path):
    model = compressed(family, LINEAR)
    expected, weights = logits(model), {}
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            weights[name] = module.to_dense()
    model.dequantize()
    assert weights and not any(isinstance(module, StructuredLinear) for module in model.modules())
    assert getattr(model.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_saved(tmp_path)), logits(model))
    assert type(model) is type(make(family))


def test_dequantize_after_loading(tmp_path):
    model = compressed("gpt2", LINEAR)
    model.save_pretrained(tmp_path)
    again = load_saved(tmp_path)
    again.dequantize()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert type(blocks(again)[0].mlp.c_fc).__name__ == "Conv1D"


def test_a_dropped_block_has_no_dense_form():
    plan = Plan.model_validate([{"blocks": "1", "method": {"name": "drop_blocks"}}])
    with pytest.raises(ValueError, match=r"model.layers.1 was dropped and its weights are gone"):
        compressed("llama", plan).dequantize()


def test_a_constant_without_a_place_has_no_dense_form():
    plan = Plan.model_validate([{"blocks": "1", "sites": ["up"], "method": {"name": "mean_output"}}])
    with pytest.raises(
        ValueError, match=r"mlp.up_proj holds a constant output, but the architecture has no bias there"
    ):
        compressed("llama", plan).dequantize()


LOAD_TWICE = """
import sys
sys.path.insert(0, {source!r})
from transformers import AutoModelForCausalLM
for folder in {folders!r}:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused:", "size mismatch" in str(error) or "mismatch" in str(error).lower())
import tensormix.hf
for folder in {folders!r}:
    AutoModelForCausalLM.from_pretrained(folder)
    print("loaded")
"""


def test_loading_without_the_plugin_fails_loudly(tmp_path):
    """In a process of its own: transformers alone would only warn and draw random layers."""
    folders = [str(tmp_path / name) for name in ("mixt", "drop")]
    for folder, method in zip(folders, [{"name": "mixt", "num_branches": 2}, {"name": "drop_blocks"}], strict=True):
        compressed("llama", Plan.model_validate([{"blocks": "1", "method": method}])).save_pretrained(folder)
    code = LOAD_TWICE.format(source=str(Path(tensormix.__file__).parents[1]), folders=folders)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["refused: True"] * 2 + ["loaded"] * 2, done.stderr[-2000:]
