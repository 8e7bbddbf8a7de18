"""Layers that are changed together: in every architecture, in memory and streamed, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import tensormix.hf  # noqa: F401
from joint_plans import BATCHES, BOTH, Same
from plans import one_rule
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.compression.fitting import replace
from tensormix.compression.kinds import planned_units
from tensormix.methods import Svd
from tensormix.models import load_model
from tensormix.plan import Plan
from tensormix.reparameterise import residual_basis, rotate_residual
from tensormix.run.check import counts, replace_empty
from tensormix.sites import blocks, find_sites
from tensormix.statistics import Gram
from zoo import ZOO, logits, make, token_ids


@pytest.mark.parametrize("family", ZOO)
def test_parts_are_found_and_put_together_again(family):
    """Neurons and channels in another order, in every layout of every architecture: the model is the same."""
    model = make(family).double()
    dense_logits = logits(model)
    before = {site.role: site.weight.clone() for site in find_sites(model) if site.block == 2 and site.role}
    rows = compress(model, one_rule(Same()), BATCHES)
    after = {row["role"]: model.get_submodule(row["site"]).to_dense() for row in rows if row["block"] == 2}
    assert torch.equal(after["down"], before["down"].flip(1))
    assert {role for role in after if not torch.equal(after[role], before[role])} >= after.keys() - {"q", "k"}
    torch.testing.assert_close(logits(model), dense_logits, rtol=1e-10, atol=1e-10)
    linear = [site for site in find_sites(make(family)) if site.kind == "linear"]
    assert [(row["site"], row["role"]) for row in rows] == [(site.name, site.role) for site in linear]
    assert all(row["relative_error"] is None and row["bits"] == row["dense_bits"] for row in rows)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "opt"])
@pytest.mark.parametrize(
    "method",
    [{"name": "flat_llm", "keep": 1.0}, {"name": "sola", "keep": 1.0}, {"name": "narrow", "keep": 1.0}],
    ids=str,
)
def test_nothing_removed_is_the_model(family, method):
    model = make(family).double()
    dense_logits = logits(model)
    compress(model, one_rule(method), BATCHES)
    torch.testing.assert_close(logits(model), dense_logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2", "gpt_neox"])
def test_streamed_and_reloaded_to_the_bit(family, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense")
    expected = compress(model, BOTH, BATCHES)
    model.save_pretrained(tmp_path / "memory")
    rows = compress_checkpoint(tmp_path / "dense", tmp_path / "out", BOTH, BATCHES)
    for row, other in zip(rows, expected, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    for folder in ("memory", "out"):
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt_neox"])
def test_check_foresees_the_sizes(family):
    model, empty = make(family), make(family)
    foreseen = replace_empty(empty, BOTH)
    rows = compress(model, BOTH, BATCHES)
    for row, ahead in zip(rows, foreseen, strict=True):
        assert all(row[key] == ahead[key] for key in ("site", "operator", "parameters", "macs_per_token"))
    assert counts(model) == counts(empty)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_principal_basis_of_the_stream_makes_narrow_blocks_better(family):
    """A stream that lives in 8 of its channels' directions: where they come first, nothing beside them is missed."""
    model = make(family).double()
    torch.manual_seed(0)
    few = torch.randn(8, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.randn(model.config.vocab_size, 8, dtype=torch.float64) @ few)
        for site in find_sites(model):
            if site.role in ("o", "down"):
                site.weight.copy_(few.T @ torch.randn(8, site.in_features, dtype=torch.float64) / 30)
    theirs = logits(model)
    narrow = one_rule({"name": "narrow", "keep": 0.25, "width": 0.25}, sites=["gate", "up", "down"])
    turned = copy.deepcopy(model)
    rotate_residual(turned, residual_basis(turned, BATCHES))
    torch.testing.assert_close(logits(turned), theirs, rtol=1e-3, atol=1e-3)  # norms are taken in float32
    errors = []
    for each in (model, turned):
        seen: list[torch.Tensor] = []
        hook = blocks(each)[0].mlp.register_forward_hook(lambda _, args, out, seen=seen: seen.extend((args[0], out)))
        logits(each)
        hook.remove()
        compress(each, narrow, BATCHES)
        with torch.no_grad():
            errors.append(float((blocks(each)[0].mlp(seen[0]) - seen[1]).norm() / seen[1].norm()))
    assert errors[1] < 1e-3 and errors[0] > 0.1


def test_what_a_method_removes_has_a_dense_form():
    model = make("opt")
    compress(model, BOTH, BATCHES)
    before = logits(model)
    model.dequantize()
    assert type(blocks(model)[1].fc1) is torch.nn.Linear
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_the_same_as_without():
    model = make("qwen3")
    compress(model, BOTH, BATCHES)
    ids, options = token_ids(rows=1, seed=4), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_the_bytes_of_what_was_removed_are_foreseen():
    model = make("llama")
    foreseen = {name: cost for unit in planned_units(model, BOTH) for name, cost in unit.costs().items()}
    for row in compress(model, BOTH, BATCHES):
        assert foreseen[row["site"]].bits == row["bits"]


def test_statistics_are_gathered_once_where_inputs_are_the_same():
    model = make("llama")
    method = BOTH.root[0].method
    group = next(unit for unit in planned_units(model, BOTH) if unit.first_block == 1)
    short = {name.rpartition(".")[2]: kinds for name, kinds in group.needs().items()}
    assert short == {"q_proj": (Gram,), "o_proj": (Gram,), "down_proj": (Gram,)} and group.method == method


def test_an_earlier_rule_keeps_its_sites():
    rules = [{"sites": ["o"], "method": Svd(keep=0.5)}, {"sites": ["q", "k"], "method": {"name": "sola", "keep": 0.5}}]
    rows = compress(make("llama"), Plan.model_validate(rules), BATCHES)
    assert [(row["role"], row["method"]) for row in rows[:3]] == [("q", "sola"), ("k", "sola"), ("o", "svd")]


def test_fewer_tokens_than_features_and_bfloat16():
    model = make("qwen2").to(torch.bfloat16)
    compress(model, BOTH, [token_ids(rows=1, length=5)])
    assert logits(model).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_statistics_of_a_group_are_given_back_before_the_next_is_fitted(monkeypatch):
    """In both, that the memory is asked back when they are needed no more."""
    left = []

    def watched(unit, stats, dense_bits, tidy):
        return replace(unit, stats, dense_bits, lambda: left.append(set(unit.needs()) & set(stats)))

    monkeypatch.setattr("tensormix.compression.walk.replace", watched)
    compress(make("llama"), one_rule({"name": "narrow", "keep": 0.5}), BATCHES)
    assert left == [set()] * 4  # one group in each block
