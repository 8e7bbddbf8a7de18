"""Rounding without data: what it equals, what it never does worse, and whom it must beat on outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.fitting.half_quadratic import half_quadratic_grid, set_apart
from tensormix.methods import Hqq, Rtn, SvdLlm
from tensormix.operators import LowRank
from tensormix.operators.packed import Packed
from tensormix.plan import Plan

O, I = 24, 64


def weight(seed=0, rows=O, columns=I):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def norm(op, of, p):
    return float((op.to_dense() - of).abs().pow(p).sum())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 20), st.integers(1, 40), st.sampled_from([2, 3, 4, 8]), st.integers(1, 17),
    st.floats(0.2, 1.0), st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_by_its_norm_it_never_loses_more_than_the_nearest_on_the_whole_range(
    rows, columns, bits, group, p, scales, seed
):
    w = weight(seed, rows, columns) * 10 ** weight(seed + 1, rows, 1)
    ours = Hqq(bits=bits, group=group, norm=p, with_scales=scales).fit(w, {})
    whole = Rtn(bits=bits, group=group, symmetric=False, zero_bits=8).fit(w, {})
    assert ours.num_bits == whole.num_bits and ours.to_dense().isfinite().all()
    assert norm(ours, w, p) <= norm(whole, w, p) * (1 + 1e-5)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_the_nearest_on_weights_with_tails(bits, scales):
    w = weight(1) ** 3
    ours = Hqq(bits=bits, group=32, with_scales=scales).fit(w, {})
    plain = Rtn(bits=bits, group=32, symmetric=False, zero_bits=8).fit(w, {})
    assert norm(ours, w, 0.7) < 0.99 * norm(plain, w, 0.7)


def test_a_zero_between_codes_is_found():
    """Numbers at odd multiples of half a step: exact with 8 bits for a zero, impossible with whole ones."""
    codes = torch.randint(0, 4, (O, I), generator=torch.Generator().manual_seed(2))
    codes[:, 0], codes[:, 1] = 0, 3
    w = (codes - 1.5) * 0.25
    assert torch.equal(Hqq(bits=2, granularity="channel").fit(w, {}).to_dense(), w)
    whole = Hqq(bits=2, granularity="channel", zero_bits=None).fit(w, {})
    assert float((whole.to_dense() - w).abs().max()) > 0.1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_large_errors_that_are_set_apart_leave_a_better_grid_for_the_others(bits):
    """Without the proximal step (beta of nothing) the zeros are plain least squares, which large errors pull."""
    w = weight(4, 200, 64) ** 3
    part = Packed(w.shape, bits=bits, group=64, symmetric=False, zero_bits=8)
    lost = []
    for beta in (10.0, 1e-9):
        scales, zeros = half_quadratic_grid(part, w, norm=0.7, steps=20, with_scales=True, beta=beta)
        part.put(scales, zeros, part.nearest(part.grouped(w), scales, zeros))
        lost.append(float((part.numbers(torch.float32) - w).abs().pow(0.7).sum()))
    assert lost[0] < 0.99 * lost[1]


def test_the_proximal_step_is_the_minimum_it_stands_for():
    """With p = 1 soft thresholding, exactly; below, small errors vanish and large ones hardly move."""
    errors = torch.linspace(-3, 3, 601, dtype=torch.float64)
    found = set_apart(errors, 1.0, 10.0)
    soft = errors.sign() * (errors.abs() - 0.1).clamp_min(0)
    torch.testing.assert_close(found, soft)
    below = set_apart(errors, 0.5, 10.0)
    assert bool((below.abs() <= errors.abs()).all()) and bool((below * errors >= 0).all())
    assert float(below[-1]) > float(found[-1]) and not below[errors.abs() < 0.2].any()


def test_it_needs_no_data_and_rounds_what_others_fit():
    assert Hqq(bits=3).needs == ()
    op = Hqq(bits=4, granularity="channel", of=SvdLlm(keep=0.5)).empty(I, O)
    assert isinstance(op.inner, LowRank) and Hqq(bits=4, of=SvdLlm(keep=0.5)).needs == SvdLlm(keep=0.5).needs


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"name": "hqq", "bits": 3, "symmetric": True}, "symmetric"),
        ({"name": "rtn", "bits": 3, "zero_bits": 8}, "zero_bits 8 has no meaning with symmetric true"),
        ({"name": "hqq", "bits": 3, "norm": 1.5}, "norm"),
    ],
)
def test_what_has_no_meaning_is_refused(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan.model_validate([{"method": method}])
