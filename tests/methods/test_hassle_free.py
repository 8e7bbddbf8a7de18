from __future__ import annotations

from itertools import pairwise
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tensormix.methods import HassleFree, Svd, SvdLlm
from tensormix.methods.alps_step import refit
from tensormix.methods.hassle_free import PATIENCE, alternate
from tensormix.methods.output_error import output_error
from tensormix.methods.sparsegpt_step import inverse_factor, sparsegpt
from tensormix.operators import LowRank, Sparse, Sum
from tensormix.operators.sparse import GROUPED, PATTERNS
from tensormix.plan import Plan
from tensormix.statistics import Gram
from tensormix.walk import compress
from zoo import make, token_ids

SOLVERS = ("alps", "sparsegpt")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(x):
    gram = Gram(x.shape[1])
    gram.update(x)
    return gram


def correlated(num_tokens, in_features, seed=1):
    spectrum = torch.logspace(0, -2, in_features)[:, None]
    return random(num_tokens, in_features, seed=seed) @ (spectrum * random(in_features, in_features, seed=seed + 1))


def planted(out_features, in_features, rank, num_values):
    """A matrix of this rank, plus entries at random places that all stand out from it."""
    low = random(out_features, rank, seed=1) @ random(rank, in_features, seed=2) / rank**0.5
    entries = random(out_features * in_features, seed=3)
    places = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(4))[:num_values]
    sparse = torch.zeros(out_features * in_features)
    sparse[places] = 3 * (entries.sign() + entries)[places]
    return low + sparse.view(out_features, in_features)


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


def budgets():
    keep, share = st.floats(0.01, 1), st.floats(0, 0.99)
    rank = st.integers(0, 12)
    grouped = st.sampled_from(sorted(GROUPED))
    return st.one_of(
        st.fixed_dictionaries({"keep": keep, "low_rank_share": share}),
        st.fixed_dictionaries({"keep": keep, "rank": rank}),
        st.fixed_dictionaries({"pattern": grouped, "keep": keep}),
        st.fixed_dictionaries({"pattern": grouped, "rank": rank}),
    )


@settings(deadline=None, max_examples=80)
@given(budgets(), st.integers(1, 20), st.integers(1, 24), st.sampled_from(SOLVERS))
def test_empty_has_the_sizes_of_fit_for_every_shape(budget, out_features, in_features, sparse):
    method = HassleFree(**budget, sparse=sparse, steps=2)
    weight, stats = random(out_features, in_features), {Gram: gram_of(random(9, in_features))}
    try:
        empty = method.empty(in_features, out_features)
    except ValueError as error:
        with pytest.raises(ValueError) as again:
            method.fit(weight, stats)
        assert str(again.value) == str(error)
        return
    fitted = method.fit(weight, stats)
    assert fitted.spec == empty.spec
    assert fitted.num_params == empty.num_params <= out_features * in_features
    if method.keep is not None:
        allowed = floor(method.keep * out_features * in_features + 1e-9)
        free = in_features + out_features - 1 if method.pattern != "unstructured" else 0  # not even one rank more
        assert allowed - free <= fitted.num_params <= allowed


@pytest.mark.parametrize(("keep", "kappa"), [(0.5, 0.3), (0.3, 0.3), (0.7, 0.5), (0.5, 0.0)])
def test_the_shares_are_the_published_ones(keep, kappa):
    """1 - s = (1 - c)(1 - kappa) with c = 1 - keep."""
    op = HassleFree(keep=keep, low_rank_share=kappa).empty(1024, 4096)
    sparse, rank = (op.terms[0], op.terms[1].rank) if isinstance(op, Sum) else (op, 0)
    assert rank == floor(kappa * keep * 1024 * 4096 / (1024 + 4096) + 1e-9)
    assert sparse.num_values / (1024 * 4096) == pytest.approx(keep * (1 - kappa), abs=5120 / (1024 * 4096))
    assert op.num_params == floor(keep * 1024 * 4096)


@pytest.mark.parametrize(("pattern", "keep"), [("2:4", 0.6), ("2:8", 0.5), ("3:8", 0.375), ("4:8", 0.75)])
def test_a_pattern_leaves_the_rest_to_the_factors(pattern, keep):
    """kappa = (1 - c - N/M) / (1 - c), and rank = kappa (1 - c) O I / (O + I)."""
    kept, size = GROUPED[pattern]
    op = HassleFree(keep=keep, pattern=pattern).empty(512, 512)
    if keep == kept / size:
        assert isinstance(op, Sparse)
    else:
        kappa = (keep - kept / size) / keep
        assert op.terms[1].rank == floor(kappa * keep * 512 * 512 / 1024 + 1e-9)
    assert HassleFree(rank=64, pattern=pattern).empty(512, 512).terms[1].rank == 64


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


def test_the_patterns_are_those_of_the_operator():
    assert HassleFree.model_fields["pattern"].annotation.__args__ == PATTERNS


@pytest.mark.parametrize("sparse", SOLVERS)
def test_factors_are_balanced(sparse):
    op = HassleFree(keep=0.5, low_rank_share=0.3, sparse=sparse, steps=2).fit(
        random(48, 64), {Gram: gram_of(correlated(99, 64))}
    )
    low = op.get_submodule("terms.1")
    assert isinstance(low, LowRank)
    torch.testing.assert_close(low.left.norm(dim=0), low.right.norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: HassleFree(keep=0.5),
            r"pattern 'unstructured' takes keep with either low_rank_share or rank, got keep",
        ),
        (lambda: HassleFree(keep=0.5, rank=1, low_rank_share=0.3), r"got keep and low_rank_share and rank"),
        (lambda: HassleFree(pattern="2:4"), r"pattern '2:4' takes either keep or rank, got none of them"),
        (lambda: HassleFree(pattern="2:4", keep=0.6, rank=8), r"takes either keep or rank, got keep and rank"),
        (lambda: HassleFree(pattern="1:4", keep=0.6), r"'unstructured', '2:4', '2:8', '3:8' or '4:8'"),
        (lambda: HassleFree(keep=0.5, low_rank_share=1.0), r"less than 1"),
        (lambda: HassleFree(keep=0.5, ratio=0.5), r"Extra inputs are not permitted"),
        (lambda: HassleFree(keep=0.5, rank=1, damping=0.0), r"greater than 0"),
        (
            lambda: HassleFree(pattern="2:4", keep=0.4).empty(64, 128),
            r"keep=0\.4 is 3276 of the 8192 numbers of a 64x128 layer, and pattern 2:4 stores at least 4096; "
            r"keep can be 0\.5 to 1\.",
        ),
        (
            lambda: HassleFree(keep=0.001, rank=0).empty(10, 10),
            r"keep=0\.001 is 0 of the 100 numbers of a 10x10 layer, and pattern unstructured stores at least 1; "
            r"keep can be 0\.01 to 1\.",
        ),
        (
            lambda: HassleFree(keep=0.5, rank=22).empty(64, 128),
            r"rank 22 does not fit into a 64x128 layer: of 4096 numbers pattern unstructured takes at least 1 and "
            r"every rank 192; rank can be 0 to 21\.",
        ),
        (
            lambda: HassleFree(pattern="2:4", rank=99).empty(64, 128),
            r"of 8192 numbers pattern 2:4 takes at least 4096 and every rank 192; rank can be 0 to 21\.",
        ),
        (
            lambda: HassleFree(pattern="2:4", rank=1).empty(30, 8),
            r"2:4 needs in_features that 4 divides, but the layer is 30x8; allowed there: unstructured\.",
        ),
        (
            lambda: HassleFree(keep=0.5, rank=1).fit(torch.ones(8, 8), {Gram: gram_of(torch.zeros(5, 8))}),
            r"calibration inputs are all zero",
        ),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
