"""Trains and BLAST in models: from disk to disk as in memory, loaded again, taken up again."""

from __future__ import annotations

import pytest
import torch

import tensormix
import zoo
from streamed import BATCHES, hashes, stop_at
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import load_model
from tensormix.operators import Concat, Operator, TensorTrain
from tensormix.operators.tensor_train import largest_ranks, mode_factors
from tensormix.plan import Plan

RULES = {
    "tensor_train": {"method": {"name": "tensor_train", "rank": 3}},
    "weighted": {"method": {"name": "tensor_train", "keep": 0.5, "modes": 3, "weighted": True, "steps": 2}},
    "dense_sparse_tt": {"method": {"name": "dense_sparse_tt", "keep": 0.5, "share": 0.01, "selector": "activation"}},
    "per_head_tt": {"sites": ["q", "k", "v", "o"], "method": {"name": "per_head_tt", "keep": 0.6, "modes": 2}},
    "btt": {"method": {"name": "btt", "keep": 0.8, "weighted": True, "steps": 2}},
    "blast": {"method": {"name": "blast", "keep": 0.6, "blocks": 4, "weighted": True, "steps": 2}},
}


# qwen2 has grouped queries and biases, phi3 fused qkv and gate_up, gpt2 transposed weights, qwen3_moe fused experts.
CASES = [
    *((rule, "qwen2") for rule in RULES),
    *((rule, "phi3") for rule in ("tensor_train", "per_head_tt")),
    ("dense_sparse_tt", "gpt2"),
    ("tensor_train", "qwen3_moe"),
]


def plan_of(rule):
    return Plan.model_validate([{"blocks": "1-2", **RULES[rule]}])


@pytest.mark.parametrize(("rule", "family"), CASES)
def test_streamed_is_in_memory_and_comes_back(tmp_path, rule, family):
    zoo.make(family).save_pretrained(tmp_path / "dense")
    plan = plan_of(rule)
    compress_checkpoint(tmp_path / "dense", tmp_path / "small", plan, BATCHES)
    model = load_model(tmp_path / "dense")
    rows = tensormix.compress(model, plan, BATCHES)
    again, x = load_model(tmp_path / "small"), zoo.token_ids()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    replaced = [row for row in rows if row["method"] != "dense"]
    assert replaced and all(row["parameters"] < row["dense_parameters"] for row in replaced)
    assert any(isinstance(part, Operator) for part in again.modules())


@pytest.mark.parametrize("rule", ["weighted", "per_head_tt"])
def test_stopped_it_goes_on_and_ends_with_the_same_files(tmp_path, rule):
    zoo.make("qwen2").save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    rows = compress_checkpoint(tmp_path / "dense", tmp_path / "straight", plan_of(rule), BATCHES)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan_of(rule), BATCHES, stop_at(len(rows) // 2 + 1))
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan_of(rule), BATCHES)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


def test_full_rank_leaves_the_logits_alone():
    """Trains with all their bonds, of every head and every layer, in a model of fp64."""
    model, x = zoo.make("qwen2").double(), zoo.token_ids()
    with torch.no_grad():
        before = model(x).logits
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            O, I = module.weight.shape
            heads = [TensorTrain.from_dense(half, **_exact(O // 2, I)) for half in module.weight.chunk(2)]
            operator = Concat(parts=heads)
            operator.bias = module.bias
            model.model.set_submodule(name, operator)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, before, rtol=1e-9, atol=1e-9)


def _exact(O, I):
    modes = {"out_modes": mode_factors(O, 4), "in_modes": mode_factors(I, 4)}
    return {**modes, "ranks": largest_ranks(**modes)}
