"""MoBE: bases that experts share are found again, one basis is a truncated SVD, and every count is the published one.

Shape letters: E experts, O out_features, I in_features, B bases, T rank.
"""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

import tensormix
import zoo
from tensormix.fitting.shared_bases import SharedBases, grouped, improved
from tensormix.methods import Mobe
from tensormix.models import load_model
from tensormix.plan import Plan

E, O, I = 8, 6, 12
DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def squared_error(op, weight) -> float:
    return float((op.to_dense().detach() - weight).square().sum())


@pytest.mark.parametrize("mirrored", [False, True])
def test_one_basis_is_the_truncated_svd_of_all_experts(mirrored):
    """Eckart and Young, for the experts above each other, or beside each other."""
    weight = torch.randn(E, O, I, **DOUBLE)
    op = Mobe(rank=3, num_bases=1, mirrored=mirrored).fit(weight, [])
    rows = (weight.mT if mirrored else weight).flatten(0, 1)
    best = float(torch.linalg.svdvals(rows)[3:].square().sum())
    assert squared_error(op, weight) == pytest.approx(best, rel=1e-9)


def test_a_basis_for_each_expert_is_its_own_svd():
    weight = torch.randn(3, O, O, **DOUBLE)
    found = grouped(weight, 3, 4, rounds=0)
    best = sum(float(torch.linalg.svdvals(each)[4:].square().sum()) for each in weight)
    assert found.squared_error(weight) == pytest.approx(best, rel=1e-9)


def test_mixed_bases_are_found_again():
    """Experts that mix two bases; groups of one basis each are not enough."""
    own, bases = torch.randn(E, O, 2, **DOUBLE), torch.randn(2, 2, I, **DOUBLE)
    weight = SharedBases(own, bases, torch.rand(E, 2, **DOUBLE)).own @ torch.einsum(
        "eb,btm->etm", torch.rand(E, 2, **DOUBLE), bases
    )
    total = float(weight.square().sum())
    start = grouped(weight, 2, 2, rounds=10)
    assert start.squared_error(weight) > 1e-3 * total
    assert improved(start, weight, 2000, 0.0).squared_error(weight) < 1e-6 * total


def test_groups_that_are_not_neighbours_are_found():
    bases = torch.randn(2, 2, I, **DOUBLE)
    weight = torch.randn(E, O, 2, **DOUBLE) @ bases[torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])]
    assert grouped(weight, 2, 2, rounds=10).squared_error(weight) < 1e-20 * float(weight.square().sum())
    assert grouped(weight, 2, 2, rounds=0).squared_error(weight) > 1e-3 * float(weight.square().sum())


def test_no_step_is_worse():
    weight = torch.randn(E, O, I, **DOUBLE)
    errors = [
        squared_error(Mobe(rank=2, num_bases=3, steps=steps, tolerance=0.0).fit(weight, []), weight)
        for steps in (0, 1, 5, 40)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.99 * errors[0]


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_an_activation_starts_at_the_linear_solution_and_gains(activation):
    weight = torch.randn(E, O, I, **DOUBLE)
    settings = {"rank": 2, "num_bases": 3}
    linear = squared_error(Mobe(**settings).fit(weight, []), weight)
    start = squared_error(Mobe(**settings, activation=activation, adam_steps=0).fit(weight, []), weight)
    after = squared_error(Mobe(**settings, activation=activation, adam_steps=300).fit(weight, []), weight)
    assert start == pytest.approx(linear, rel=0.02)
    assert after < 0.995 * start


@pytest.mark.parametrize(("num_bases", "ratio"), [(16, 0.50), (32, 0.625), (54, 0.80)])
def test_the_ratios_of_the_paper(num_bases, ratio):
    """Qwen3-30B-A3B: 128 experts of 768 x 2048, T = 768, without the mixing, which is a thousandth of a percent."""
    op = Mobe(rank=768, num_bases=num_bases).empty(128, 2048, 768)
    assert op.num_params / (128 * 768 * 2048) == pytest.approx(ratio, abs=0.004)
    assert not op.mirrored


def test_the_rank_uses_the_budget_and_wide_experts_are_mirrored():
    op = Mobe(keep=0.5, num_bases=2).empty(8, 64, 256)
    dense = 8 * 64 * 256
    assert op.mirrored and op.num_params <= 0.5 * dense < op.num_params + 8 * 64 + 2 * 256
    assert Mobe(keep=0.5, num_bases=2, mirrored=False).empty(8, 64, 256).rank < op.rank


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_models_streamed_and_in_memory_and_loaded_again(tmp_path, family):
    zoo.make(family).save_pretrained(tmp_path / "dense")
    plan = Plan.model_validate([{"blocks": "1-2", "method": {"name": "mobe", "keep": 0.6, "num_bases": 2}}])
    tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "small", plan)
    model = load_model(tmp_path / "dense")
    rows = tensormix.compress(model, plan)
    again, x = load_model(tmp_path / "small"), zoo.token_ids()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    assert len(rows) == 4 and all(row["parameters"] <= 0.6 * row["dense_parameters"] for row in rows)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mobe(), ("keep", "rank")),
        (lambda: Mobe(rank=7).empty(E, I, O), ("rank=7", "704", "576", "is 5")),
        (lambda: Mobe(rank=2880, num_bases=16).empty(32, 2880, 2880), ("more than", "is 1919")),
        (lambda: Mobe(keep=0.05).empty(E, I, O), ("keep=0.05", "0.222223")),
    ],
)
def test_errors_say_what_is_possible(make, words):
    with pytest.raises((ValueError, ValidationError)) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value
