"""What the walk says of each site, and what of a model it leaves as it was."""

from __future__ import annotations

import json

import pytest
import torch

from plans import plan_of
from tensormix.compression import compress
from tensormix.methods import DropBlocks, MeanOutput, Svd, ZeroMethod
from tensormix.sites import blocks, find_sites
from zoo import make, token_ids


def test_rows():
    model, told = make("gpt2"), []
    rows = compress(model, plan_of({"method": Svd(keep=0.5), "blocks": "last 1"}), progress=lambda *a: told.append(a))
    json.dumps(rows, allow_nan=False)
    up = next(row for row in rows if row["role"] == "up")
    assert up.pop("seconds") >= 0
    assert 0 < up.pop("relative_error") < 1
    assert up == {
        "site": "transformer.h.3.mlp.c_fc",
        "block": 3,
        "role": "up",
        "method": "svd",
        "operator": "LowRank",
        "dense_parameters": 32 * 128,
        "parameters": 12 * (32 + 128),
        "dense_bits": 32 * 32 * 128,
        "bits": 32 * 12 * (32 + 128),
        "dense_macs_per_token": 32 * 128,
        "macs_per_token": 12 * (32 + 128),
    }
    assert told == [(number, 4, row["site"]) for number, row in enumerate(rows, 1)]


def test_the_relative_error_is_that_of_the_best_low_rank_weight():
    model = make("gpt2")
    weight = next(site.weight for site in find_sites(model) if site.role == "up").clone()
    (row,) = compress(model, plan_of({"method": Svd(keep=0.5), "blocks": "0", "sites": ("up",)}))
    values = torch.linalg.svdvals(weight)
    assert row["relative_error"] == pytest.approx(float(values[12:].norm() / values.norm()), rel=1e-4)


def test_a_zero_weight_has_no_relative_error():
    model = make("llama")
    blocks(model)[0].mlp.up_proj.weight.data.zero_()
    (row,) = compress(model, plan_of({"method": ZeroMethod(), "blocks": "0", "sites": ("up",)}))
    assert row["relative_error"] is None


def test_compressing_twice():
    model, ids = make("llama"), token_ids()
    compress(model, plan_of({"method": Svd(keep=0.5), "blocks": "0"}))
    with pytest.raises(ValueError, match=r"plan\[0\] \(blocks '0'\) matches no site that is still dense"):
        compress(model, plan_of({"method": ZeroMethod(), "blocks": "0"}))
    rows = compress(model, plan_of({"method": MeanOutput(), "blocks": "0-1"}), [ids])
    assert {row["block"] for row in rows} == {1}
    compress(model, plan_of({"method": DropBlocks(), "blocks": "1,3"}))
    operators = model.config.quantization_config.operators
    assert {name.split(".")[2] for name in operators} == {"0", "1", "3"}
    assert operators["model.layers.1"]["operator"] == "Bypass"


def test_modes_are_restored():
    """OPT skips blocks at random in training mode, so the walk needs evaluation mode; afterwards it is as before."""
    model = make("opt").train()
    blocks(model)[1].eval()
    compress(model, plan_of({"method": MeanOutput(), "blocks": "0-1"}), [token_ids()] * 3)
    assert model.training and blocks(model)[0].fc1.training and blocks(model)[0].training
    assert not blocks(model)[1].fc1.training and not blocks(model)[1].training


def test_no_gradients_are_left():
    model = make("llama")
    compress(model, plan_of({"method": MeanOutput()}), [token_ids()])
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in model.parameters())


def test_tied_embeddings_stay_tied():
    model = make("qwen3")
    compress(model, plan_of({"method": Svd(keep=0.5)}))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
