"""HASSLE-free: sparse plus low rank is found where it is, and each step lowers the error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_inputs import SOLVERS, correlated, gram_of, planted, random
from tensormix.compression import compress
from tensormix.fitting.alps_step import refit
from tensormix.fitting.output_error import output_error
from tensormix.fitting.sparsegpt_step import inverse_factor, sparsegpt
from tensormix.methods import HassleFree, Svd, SvdLlm
from tensormix.methods.hassle_free import PATIENCE, alternate
from tensormix.operators import LowRank, Sparse
from tensormix.plan import Plan
from tensormix.statistics import Gram
from zoo import make, token_ids


def relative_error(op, weight, gram):
    error = (weight - op.to_dense()).detach().double()
    return output_error(error, gram.mean) / output_error(weight.double(), gram.mean)


@pytest.mark.parametrize("sparse", SOLVERS)
@pytest.mark.parametrize("shape", [(64, 64), (96, 48), (40, 80)])
def test_what_is_sparse_plus_low_rank_is_recovered(sparse, shape):
    out_features, in_features = shape
    weight = planted(*shape, rank=3, num_values=200)
    gram = gram_of(random(1000, in_features) @ (torch.eye(in_features) + 0.1 * random(in_features, in_features)))
    keep = (200 + 3 * sum(shape)) / (out_features * in_features)
    both = HassleFree(keep=keep, rank=3, sparse=sparse).fit(weight, {Gram: gram})
    assert relative_error(both, weight, gram) < 1e-9
    assert (both.to_dense() - weight).norm() < 1e-4 * weight.norm()
    stored = both.num_params
    for alone in (HassleFree(keep=keep, rank=0, sparse=sparse), SvdLlm(keep=keep), Svd(keep=keep)):
        op = alone.fit(weight, {Gram: gram})
        assert stored - sum(shape) < op.num_params <= stored
        assert relative_error(op, weight, gram) > 0.01


@pytest.mark.parametrize("sparse", SOLVERS)
@pytest.mark.parametrize("budget", [{"keep": 0.5, "low_rank_share": 0.3}, {"keep": 0.6, "pattern": "2:4"}], ids=str)
def test_every_alternation_that_is_kept_lowers_the_error(sparse, budget):
    weight, gram = random(48, 64), gram_of(correlated(500, 64))
    fits = [HassleFree(**budget, sparse=sparse, steps=n).fit(weight, {Gram: gram}) for n in (1, 2, 4, 8, 16)]
    errors = [relative_error(op, weight, gram) for op in fits]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_a_rho_that_does_not_grow_lets_the_support_move_to_a_better_one():
    weight, gram = random(48, 64), gram_of(correlated(500, 64))
    grown, kept = (
        HassleFree(keep=0.5, low_rank_share=0.3, rho_growth=growth, steps=30).fit(weight, {Gram: gram})
        for growth in (5.0, 0.0)
    )
    assert relative_error(kept, weight, gram) < 0.8 * relative_error(grown, weight, gram)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_two_optimal_steps_never_raise_the_error(shape):
    """With the support fixed both steps are exact, so that the error falls with every one of them."""
    weight, x = random(*shape).double(), correlated(100, shape[1]).double()
    gram = x.T @ x / len(x)
    mask = random(*shape, seed=5) > 0.5
    steps = 15
    best, errors = alternate(
        weight,
        gram,
        torch.linalg.cholesky(gram),
        lambda target, step: (refit(target, gram, mask, torch.zeros_like(target), steps=100), mask),
        rank=3,
        steps=steps,
    )
    assert len(errors) == steps
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    assert output_error(weight - best.sparse - best.left @ best.right, gram) == pytest.approx(min(errors), rel=1e-9)


def test_the_best_pair_is_returned_and_the_end_comes_when_nothing_is_gained():
    weight, gram = random(6, 8), torch.eye(8)
    mask = torch.ones(6, 8, dtype=torch.bool)
    errors_wanted = [5.0, 3.0, 4.0, *[3.5] * 100]

    def step(target, number):  # leaves an error of known size in a direction that the low rank cannot take
        return weight - errors_wanted[number] * torch.eye(6, 8) / 6**0.5, mask

    best, errors = alternate(weight, gram, gram, step, rank=1, steps=80)
    assert len(errors) == 2 + PATIENCE
    assert errors.index(min(errors)) == 1
    assert output_error(weight - best.sparse - best.left @ best.right, gram) == pytest.approx(min(errors))


def test_both_together_beat_either_alone_on_a_random_weight():
    """The weight has no structure at all; the inputs have. (ALPS alone is better still, so this is about SparseGPT.)"""
    sparse = "sparsegpt"
    weight, gram = random(64, 64), gram_of(correlated(500, 64))
    both = HassleFree(keep=0.5, low_rank_share=0.3, sparse=sparse, steps=40).fit(weight, {Gram: gram})
    values_only = HassleFree(keep=0.5, rank=0, sparse=sparse).fit(weight, {Gram: gram})
    factors_only = SvdLlm(keep=0.5).fit(weight, {Gram: gram})
    assert both.num_params == values_only.num_params == factors_only.num_params == 2048
    assert isinstance(values_only, Sparse)
    error = relative_error(both, weight, gram)
    assert error < 0.9 * relative_error(values_only, weight, gram)
    assert error < 0.9 * relative_error(factors_only, weight, gram)


def test_rank_zero_is_the_sparse_step_alone():
    weight, x = random(6, 16), correlated(100, 16)
    op = HassleFree(keep=0.5, rank=0, sparse="sparsegpt", relative_damping=0.1).fit(weight, {Gram: gram_of(x)})
    gram = x.double().T @ x.double() / 100
    gram += torch.diag(0.1 * gram.diagonal() + 0.005 * gram.diagonal().mean())
    expected, _ = sparsegpt(weight, inverse_factor(gram).float(), num_values=48)
    torch.testing.assert_close(op.to_dense().detach(), expected, rtol=1e-4, atol=1e-4)


INPUTS = {
    "fewer tokens than features": random(5, 16),
    "constant": torch.ones(30, 16),
    "one token": random(1, 16),
    "features that are always zero": random(50, 16) * (torch.arange(16) % 3 > 0),
    "tiny": 1e-12 * random(50, 16),
    "huge": 1e12 * random(50, 16),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sparse", SOLVERS)
@pytest.mark.parametrize("budget", [{"keep": 0.6, "low_rank_share": 0.4}, {"pattern": "2:8", "rank": 3}], ids=str)
def test_poor_inputs_still_give_a_fit(inputs, dtype, sparse, budget):
    weight, gram = random(12, 16).to(dtype), gram_of(INPUTS[inputs])
    op = HassleFree(**budget, sparse=sparse, steps=8).fit(weight, {Gram: gram})
    assert {p.dtype for p in op.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in op.parameters())
    # bf16 rounds every value by up to 1/256 and that error is amplified where the terms cancel.
    assert relative_error(op, weight, gram) < 0.5
    assert relative_error(op, weight, gram) < relative_error(Svd(keep=0.6).fit(weight, {}), weight, gram)


def test_a_bf16_model_is_saved_and_loaded_bit_equal(tmp_path):
    plan = Plan.model_validate(
        [
            {"blocks": "0", "method": {"name": "hassle_free", "keep": 0.5, "low_rank_share": 0.3, "steps": 2}},
            {"blocks": "1", "method": {"name": "hassle_free", "pattern": "2:4", "rank": 2, "steps": 2}},
            {"blocks": "2", "method": {"name": "hassle_free", "keep": 0.05, "rank": 0}},
        ]
    )
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")  # its rotary frequencies in fp32
    compress(model, plan, [token_ids()])
    model.save_pretrained(tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(report.values())
    state = model.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in again.state_dict().items()} == {
        name: (t.dtype, t.shape) for name, t in state.items()
    }
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    # Mapped weights may lie at odd addresses, and products depend on that.
    for loaded in (model, again):
        loaded.load_state_dict({name: t.clone() for name, t in loaded.state_dict().items()}, assign=True)
    with torch.no_grad():
        assert torch.equal(again(token_ids(seed=3)).logits, model(token_ids(seed=3)).logits)


@pytest.mark.parametrize("sparse", SOLVERS)
def test_factors_are_balanced(sparse):
    op = HassleFree(keep=0.5, low_rank_share=0.3, sparse=sparse, steps=2).fit(
        random(48, 64), {Gram: gram_of(correlated(99, 64))}
    )
    low = op.get_submodule("terms.1")
    assert isinstance(low, LowRank)
    torch.testing.assert_close(low.left.norm(dim=0), low.right.norm(dim=1), rtol=1e-4, atol=1e-6)
