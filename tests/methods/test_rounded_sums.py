"""Rounding plus a correction: what it equals, the optima that it reaches, and where it must beat rounding alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrated import correlated, error, seen
from tensormix.compression import compress
from tensormix.fitting.output_error import output_error
from tensormix.fitting.rounding_steps import Columns, corrected_codes, searched_grid
from tensormix.methods import Gptq, RoundedLowRank, RoundedSparse, Rtn
from tensormix.operators import LowRank, Quantized, Sparse, Sum, build
from tensormix.operators.packed import Packed
from tensormix.plan import Plan
from tensormix.statistics import Gram, HeldOutGram
from zoo import make, token_ids

I, O = 96, 40


def inputs(num_tokens, size=I, seed=0):
    return correlated(num_tokens, size, decades=1, seed=seed)


def weight(seed=0, rows=O, columns=I):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


NONE = [RoundedLowRank(bits=3, group=32, rank=0), RoundedSparse(bits=3, group=32, share=0.0)]
SOME = [RoundedLowRank(bits=2, group=32, rank=4), RoundedSparse(bits=2, group=32, share=0.03)]


@pytest.mark.parametrize("method", NONE, ids=lambda m: m.name)
def test_without_a_correction_it_is_gptq(method):
    stats = seen(inputs(2000))
    (ours, facts), (plain, theirs) = (m.fit_with_facts(weight(), stats) for m in (method, Gptq(bits=3, group=32)))
    assert isinstance(ours, Quantized) and ours.spec == plain.spec and facts == theirs
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("method", SOME, ids=lambda m: m.name)
def test_no_round_raises_the_error_and_the_best_one_is_what_is_returned(method):
    w, stats = weight(), seen(inputs(2000))
    op, facts = method.fit_with_facts(w, stats)
    errors = facts["round_errors"]
    assert len(errors) > 2 and errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    gram = stats[Gram].mean
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(I)
    missed = w.double() - op.to_dense().detach().double()
    assert output_error(missed, gram) / output_error(w.double(), gram) == pytest.approx(errors[-1], rel=1e-5)


@pytest.mark.parametrize("method", SOME, ids=lambda m: m.name)
def test_on_new_tokens_it_beats_rounding_alone(method):
    w, x, stats = weight(), inputs(1000, seed=1), seen(inputs(3000))
    alone = Gptq(bits=2, group=32).fit(w, stats)
    once = method.model_copy(update={"rounds": 1}).fit(w, stats)
    assert error(method.fit(w, stats), w, x) <= error(once, w, x) < error(alone, w, x)


def test_a_first_round_with_exact_factors_is_the_optimum_for_these_integers():
    """Eckart and Young for (W - Q) G^(1/2)."""
    w, stats = weight().double(), seen(inputs(3000))
    op = RoundedLowRank(bits=2, group=32, rank=5, rounds=1, correction_bits=None).fit(w, stats)
    gram = stats[Gram].mean
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(I)
    left_over = w - Gptq(bits=2, group=32).fit(w, stats).to_dense()
    optimum = torch.linalg.svdvals(left_over @ torch.linalg.cholesky(gram))[5:].square().sum()
    assert output_error(w - op.to_dense().detach(), gram) == pytest.approx(float(optimum), rel=1e-9)


def test_a_grid_plus_a_large_low_rank_is_found_exactly():
    """Where the low rank holds most of the weight, it is found first, and the grid in what is left of it."""
    rows, columns, generator = 128, 96, torch.Generator().manual_seed(1)
    grid = torch.randint(-1, 2, (rows, columns), generator=generator).double() / 4
    left, right = (torch.randn(shape, generator=generator).double() for shape in ((rows, 1), (1, columns)))
    w, x = grid + 30 * left @ right, torch.randn(3000, columns, generator=generator)
    sizes = {"bits": 2, "granularity": "channel", "symmetric": True, "correction_bits": None, "rounds": 40}
    op = RoundedLowRank(rank=1, start="low_rank", **sizes).fit(w, seen(x))
    assert float((op.to_dense().detach() - w).norm() / grid.norm()) < 1e-6
    assert error(Gptq(bits=2, granularity="channel", symmetric=True).fit(w, seen(x)), w, x.double()) > 0.1


def test_with_inputs_that_are_not_correlated_no_other_entries_lose_less():
    """Then an entry loses (w - q)^2 g, so that of all choices the largest of these are the best to keep."""
    w, sizes = weight().double(), torch.rand(I).double() + 0.1
    stats = seen(inputs(3000))
    stats[Gram]._held, stats[HeldOutGram]._held = (torch.diag(sizes) * n for n in (8000, 1000))
    op = RoundedSparse(bits=3, group=32, share=0.05, rounds=1, correction_bits=None).fit(w, stats)
    kept = op.terms[1].mask
    assert torch.equal(op.to_dense()[kept], w[kept])
    again = RoundedSparse(bits=3, group=32, share=0.05, rounds=2, correction_bits=None).fit(w, stats).terms[1].mask
    lost = (w - op.terms[0].to_dense()).square() * (sizes + 0.01 * sizes.mean())
    assert float(lost[again].min()) >= float(lost[~again].max())


def test_outliers_of_every_group_are_what_it_keeps():
    generator = torch.Generator().manual_seed(5)
    w, x = 0.1 * weight(), torch.randn(3000, I, generator=generator)
    places = torch.randperm(O * I, generator=generator)[:60]
    w.view(-1)[places] = 10.0
    op = RoundedSparse(bits=3, group=32, share=60 / (O * I), correction_bits=8).fit(w, seen(x))
    assert set(op.terms[1].dequantized().mask.flatten().nonzero()[:, 0].tolist()) == set(places.tolist())
    quiet = torch.ones(O * I, dtype=torch.bool).index_fill(0, places, False).view(O, I)
    off = (op.to_dense() - w)[quiet].norm() / w[quiet].norm()
    alone = (Gptq(bits=3, group=32).fit(w, seen(x)).to_dense() - w)[quiet].norm() / w[quiet].norm()
    assert off < 0.5 * alone


def test_columns_that_are_exact_lose_nothing_and_pass_nothing_on():
    w, part = weight().double(), Packed((O, I), bits=2, group=16, symmetric=False)
    gram = inputs(500).double()
    columns, grid = Columns.of(gram.T @ gram, 0.01), searched_grid(part, w, torch.ones(I, dtype=torch.float64))
    _, meant = corrected_codes(part, w, columns, *grid, exact=torch.ones(O, I, dtype=torch.bool))
    assert torch.equal(meant, w)
    some = torch.arange(I).expand(O, I) % 2 == 0
    codes, meant = corrected_codes(part, w, columns, *grid, exact=some)
    part.put(*grid, codes)
    kept = torch.where(some, meant, part.numbers(torch.float64))
    part.put(*grid, corrected_codes(part, w, columns, *grid)[0])
    damped = gram.T @ gram
    assert output_error(w - kept, damped) < output_error(w - part.numbers(torch.float64), damped)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 9), st.sampled_from([2, 3, 4, 8, None]), st.booleans())
def test_any_shape_is_stored_as_foreseen_and_every_bit_is_counted(rows, columns, group, bits, few):
    """Groups that do not divide the width leave a shorter last one."""
    w, stats = weight(rows=rows, columns=columns), seen(inputs(1 if few else 400, columns))
    for method in (
        RoundedLowRank(bits=3, group=group, rank=min(rows, columns) // 2, correction_bits=bits, rounds=2),
        RoundedSparse(bits=2, group=group, share=0.2, correction_bits=bits, rounds=2),
    ):
        op, facts = method.fit_with_facts(w, stats)
        empty = method.empty(columns, rows)
        assert op.spec == empty.spec and op.num_bits == empty.num_bits and op.to_dense().isfinite().all()
        assert facts["calibration_tokens"] == (1 if few else 400) and (facts["rounding"] == "nearest" or not few)
        groups = rows * -(-columns // min(group, columns))
        packed = {2: 4, 3: 8}[method.bits]  # codes to so many bytes; zeros are packed alike
        words = sum(-(-count // packed) for count in (rows * columns, groups))
        assert op.terms[0].num_bits == words * 8 * {2: 1, 3: 3}[method.bits] + 16 * groups
        again = build(op.spec)
        again.load_state_dict(op.state_dict())
        x = torch.randn(3, columns)
        assert torch.equal(again(x), op(x))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (RoundedLowRank(bits=3, rank=41), r"rank must be in 1\.\.40 for a 96x40 layer, got 41"),
        (RoundedSparse(bits=3, share=1e-5), r"keeps no entry of a 96x40 layer; the smallest.* is 0\.000260, and 0 is"),
    ],
)
def test_a_size_that_a_layer_does_not_allow_is_said_before_and_in_the_fit(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        method.empty(I, O)
    with pytest.raises(ValueError, match=sentence):
        method.fit(weight(), seen(inputs(200)))


def test_what_stands_beside_the_integers_is_rounded_as_asked():
    op = RoundedLowRank(bits=2, group=32, rank=4).fit(weight(), seen(inputs(500)))
    assert isinstance(op, Sum) and [type(term.inner).__name__ for term in op.terms] == ["Dense", "LowRank"]
    assert op.terms[1].bits == 4
    plain = [m.model_copy(update={"correction_bits": None}).fit(weight(), seen(inputs(500))).terms[1] for m in SOME]
    assert [type(term) for term in plain] == [LowRank, Sparse]


@pytest.mark.parametrize("method", ["rounded_low_rank", "rounded_sparse"])
def test_a_model_is_nearer_than_with_rounding_alone(method):
    size = {"rank": 6} if method == "rounded_low_rank" else {"share": 0.2}
    ids = torch.randint(61, (24, 48), generator=torch.Generator().manual_seed(0))
    off = {}
    for name, more in ((method, size | {"correction_bits": 8}), ("gptq", {})):
        model = make("llama")
        dense = model(token_ids()).logits
        rows = compress(model, Plan.of([{"method": {"name": name, "bits": 2, "group": 8, **more}}]), list(ids[:, None]))
        assert all(row["bits"] > 0 and row["calibration_tokens"] == 24 * 48 for row in rows)
        off[name] = float((model(token_ids()).logits - dense).detach().norm())
    assert off[method] < off["gptq"]


def test_nearest_rounding_that_is_kept_gets_a_correction_too():
    w, stats = weight(), seen(inputs(1))
    op, facts = RoundedLowRank(bits=2, group=32, rank=8).fit_with_facts(w, stats)
    plain = Rtn(bits=2, group=32, symmetric=False).fit(w, {})
    assert facts["rounding"] == "nearest" and facts["calibration_tokens"] == 1
    gram = stats[Gram].mean + 0.1 * stats[Gram].mean.diagonal().mean() * torch.eye(I)
    ours, theirs = (output_error((w - each.to_dense().detach()).double(), gram) for each in (op, plain))
    assert ours < theirs
