"""Checkpoints in fp8 or MXFP4: fitted as plain weights, counted as they are stored, passed on as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from packed_checkpoints import save_packed
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.methods import MeanOutput, Svd
from tensormix.models import load_model
from tensormix.plan import Plan, Rule
from tensormix.storage.formats import open_weights
from zoo import token_ids

FAMILIES = ["llama", "deepseek_v3", "gpt_oss"]
PLANS = {
    "weights_only": Plan((Rule(method=Svd(keep=0.6), blocks="1,3"),)),
    "calibrated": Plan((Rule(method=MeanOutput(), blocks="2"), Rule(method=Svd(keep=0.6), blocks="0"))),
}
BATCHES = [token_ids(seed=1), token_ids(seed=2, length=7)]


def logits(folder: Path, **options) -> torch.Tensor:
    return load_model(folder, **options)(token_ids(seed=5)).logits


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_from_plain_weights(tmp_path, family, plan):
    save_packed(tmp_path, family)
    model = load_model(tmp_path / "plain")
    expected = compress(model, plan, BATCHES)
    rows = compress_checkpoint(tmp_path / "packed", tmp_path / "out", plan, BATCHES)
    assert [row["relative_error"] for row in rows] == [row["relative_error"] for row in expected]
    model.save_pretrained(tmp_path / "memory")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "memory"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_compressed_stays_packed_byte_for_byte(tmp_path, family):
    save_packed(tmp_path, family)
    compress_checkpoint(tmp_path / "packed", tmp_path / "out", PLANS["weights_only"])
    before, after = open_weights(tmp_path / "packed").entries, open_weights(tmp_path / "out").entries
    kept = [name for name in before if not any(f"layers.{n}." in name for n in (1, 3))]
    assert any(before[name].dtype in ("F8_E4M3", "U8") for name in kept)
    for name in kept:
        assert after[name].dtype == before[name].dtype and list(after[name].chunks()) == list(before[name].chunks())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    source = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "tensormix" and config["packed"]["quant_method"] == source["quant_method"]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_dtype_unpacks_everything(tmp_path, family):
    save_packed(tmp_path, family)
    compress_checkpoint(tmp_path / "packed", tmp_path / "out", PLANS["weights_only"], dtype="float32")
    entries = open_weights(tmp_path / "out").entries.values()
    assert {entry.dtype for entry in entries} == {"F32"}
    assert "packed" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    model = load_model(tmp_path / "packed", dtype="float32")
    compress(model, PLANS["weights_only"])
    assert torch.equal(logits(tmp_path / "out", dtype="float32"), model(token_ids(seed=5)).logits)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_without_a_plan(tmp_path, dtype):
    """Copied as it is, or unpacked: a converter."""
    save_packed(tmp_path, "llama")
    compress_checkpoint(tmp_path / "packed", tmp_path / "out", Plan(()), dtype=dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") == ("fp8" if dtype == "auto" else None)
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "plain"))


def test_bits_are_those_that_are_stored(tmp_path):
    """A byte for each number of an fp8 weight, and four for each scale."""
    save_packed(tmp_path, "llama", (16, 16))
    rows = compress_checkpoint(tmp_path / "packed", tmp_path / "out", PLANS["weights_only"])
    down = next(row for row in rows if row["role"] == "down")
    assert down["dense_bits"] == 8 * (32 * 48 + 4 * 2 * 3)
    assert down["bits"] == 16 * down["parameters"]


def test_a_weight_that_cannot_be_unpacked_is_named(tmp_path):
    save_packed(tmp_path, "llama", (16, 16))
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mlp.up_proj.weight_scale_inv"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.3.mlp.up_proj.weight: fp8: 1 of 6 scales are NaN or infinite"):
        compress_checkpoint(tmp_path / "packed", tmp_path / "out", PLANS["weights_only"])
