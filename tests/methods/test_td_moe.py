"""TD-MoE: exact where it can be, optimal in the cases with a closed form, and the ranks and counts of the papers.

Shape letters: E experts, O out_features, I in_features.
"""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

import tensormix
import zoo
from expert_models import UP, site_at
from tensormix.methods import TdMoe
from tensormix.models import load_model
from tensormix.operators.tucker_stack import num_params
from tensormix.plan import Plan
from tensormix.statistics import Gram

E, O, I = 6, 10, 8
DOUBLE = {"dtype": torch.float64}


def seen(tokens=(40,) * E, inputs: int = I, directions: int | None = None):
    """The statistics of experts that get so many tokens, which lie in so few directions."""
    mix = torch.randn(directions or inputs, inputs, **DOUBLE) * torch.linspace(3, 0.1, inputs, **DOUBLE)
    stats = []
    for count in tokens:
        gram = Gram(inputs)
        if count:
            gram.update(torch.randn(count, len(mix), **DOUBLE) @ mix)
        stats.append({Gram: gram})
    return stats


def weighted_error(op, weight, stats) -> float:
    """sum_e p_e ||(W_e - W'_e) S||^2 with S S^T the Gram matrix of all inputs."""
    tokens = torch.tensor([max(1, s[Gram].num_tokens) for s in stats], **DOUBLE)
    pooled = sum(s[Gram].sum for s in stats) / sum(s[Gram].num_tokens for s in stats)
    missed = op.to_dense().detach() - weight
    return float(torch.einsum("e,eoi,ij,eoj->", tokens / tokens.sum(), missed, pooled, missed))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("ranks", [(E, 4, 3), (2, 4, 3), (3, 5, 6)], ids=str)
def test_what_has_these_ranks_is_found_again(ranks):
    stats = seen((40, 3, 0, 7, 40, 40))
    planted = TdMoe(ranks=ranks, experts="compress").fit(torch.randn(E, O, I, **DOUBLE), stats).to_dense().detach()
    fitted = TdMoe(ranks=ranks, experts="compress").fit(planted, stats)
    torch.testing.assert_close(fitted.to_dense(), planted, rtol=0, atol=1e-9)
    fewer = (ranks[0], ranks[1] - 1, ranks[2])
    worse = TdMoe(ranks=fewer).fit(planted, stats).to_dense().detach()
    assert float((worse - planted).norm() / planted.norm()) > 0.05


def test_one_expert_is_the_best_low_rank_on_its_inputs():
    """With one expert, and no limit on the outputs, it is SVD-LLM: Eckart and Young for W S."""
    stats, weight = seen((50,), 8), torch.randn(1, 30, 8, **DOUBLE)
    op = TdMoe(ranks=(1, 4, 4)).fit(weight, stats)
    root = torch.linalg.cholesky(stats[0][Gram].mean)
    best = float(torch.linalg.svdvals(weight[0] @ root)[4:].square().sum())
    assert weighted_error(op, weight, stats) == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("experts", ["preserve", "compress"])
@pytest.mark.parametrize("directions", [I, 5])
def test_weights_of_inputs_and_experts_pay(experts, directions):
    """Judged by the weighted error the weighted fit wins, and each half of the weighting helps."""
    weight, stats = torch.randn(E, O, I, **DOUBLE), seen((200, 100, 5, 5, 5, 1), directions=directions)
    ranks = (E if experts == "preserve" else 3, 4, 4)
    errors = {
        (whiten, routing): weighted_error(
            TdMoe(ranks=ranks, experts=experts, whiten=whiten, routing=routing, steps=100, tolerance=0.0).fit(
                weight, stats
            ),
            weight,
            stats,
        )
        for whiten in (True, False)
        for routing in (True, False)
    }
    assert errors[True, True] == min(errors.values())
    assert errors[True, True] < 0.9 * errors[False, False]


def test_more_steps_are_never_worse():
    weight, stats = torch.randn(E, O, I, **DOUBLE), seen()
    errors = [
        weighted_error(TdMoe(ranks=(2, 3, 3), steps=n, tolerance=0.0).fit(weight, stats), weight, stats)
        for n in (0, 1, 5, 50)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("experts", ["preserve", "compress"])
def test_a_budget_is_kept_and_is_used(keep, experts):
    weight, stats = torch.randn(E, O, I, **DOUBLE), seen()
    op = TdMoe(keep=keep, experts=experts).fit(weight, stats)
    dense = E * O * I
    assert op.num_params <= keep * dense
    A, R, S = op.ranks
    assert S == I or num_params(E, O, I, (A, R, S + 1)) > keep * dense
    assert (A == E) or experts == "compress"


def test_the_ranks_of_the_paper_are_those_of_its_rule():
    preserve = TdMoe(keep=0.6, rank_rule="published").empty(32, 2880, 2880)
    assert preserve.ranks == (32, 1720, 2664) and preserve.num_params == round(0.6 * 32 * 2880**2)
    compress = TdMoe(keep=0.6, rank_rule="published", experts="compress").empty(32, 2880, 2880)
    assert compress.ranks == (20, 2496, 2880)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_models_streamed_and_in_memory_and_loaded_again(tmp_path, family):
    zoo.make(family).save_pretrained(tmp_path / "dense")
    rule = {"name": "td_moe", "keep": 0.5, "experts": "compress"}
    plan = Plan.model_validate([{"blocks": "1-2", "sites": ["gate_up", "down"], "method": rule}])
    batches = [zoo.token_ids(seed=seed) for seed in range(2)]
    tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", plan, batches)
    small = load_model(tmp_path / "dense")
    rows = tensormix.compress(small, plan, batches)
    small.save_pretrained(tmp_path / "memory")
    again, other = (load_model(tmp_path / folder) for folder in ("streamed", "memory"))
    values = other.state_dict()
    assert all(torch.equal(tensor, values[name]) for name, tensor in again.state_dict().items())
    x = zoo.token_ids()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, small(x).logits)
    assert all(row["parameters"] <= 0.5 * row["dense_parameters"] for row in rows)


def test_the_dense_experts_come_back_at_full_rank():
    model, x = zoo.make("qwen3_moe"), zoo.token_ids()
    weight = site_at(model, UP).weight.double()
    count, rows, columns = weight.shape
    method = TdMoe(ranks=(1, 1, 1))
    whole = method.model_copy(update={"ranks": (count, min(rows, count * columns), columns)})
    with pytest.raises(ValueError, match="more than"):  # it would hold more than the dense experts
        whole.empty(count, columns, rows)
    assert x.shape and method.empty(count, columns, rows).num_params < weight.numel()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TdMoe(), ("keep", "ranks")),
        (lambda: TdMoe(ranks=(7, 1, 1)).empty(E, I, O), ("1..6", "got 7", "experts")),
        (lambda: TdMoe(ranks=(E, O, I)).empty(E, I, O), ("644", "480", "is 5")),
        (lambda: TdMoe(keep=0.01).empty(E, I, O), ("keep=0.01", "0.05")),
    ],
)
def test_errors_say_what_is_possible(make, words):
    with pytest.raises((ValueError, ValidationError)) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value
