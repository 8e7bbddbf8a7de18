"""What is particular to single statistics, above all the streamed QR factor."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.statistics import Gram, InputNorms, QRFactor


def spread(num_tokens, in_features, smallest, dtype=torch.float64):
    """Inputs (N, I) whose singular values fall evenly on a log scale from 1 to `smallest`, in no particular basis."""
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(num_tokens, in_features, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_features, in_features, dtype=torch.float64)).Q
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), in_features, dtype=torch.float64)
    return (left * values @ right.T).to(dtype), values


@settings(deadline=None, max_examples=40)
@given(in_features=st.integers(1, 12), cuts=st.lists(st.integers(0, 400), min_size=1, max_size=4), dead=st.booleans())
def test_the_factor_is_a_root_of_the_gram_however_the_batches_are_cut(in_features, cuts, dead):
    """Fewer tokens than features, more than the buffer holds, and features that are always zero included."""
    num_tokens = sum(cuts)
    x = torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(num_tokens), dtype=torch.float64)
    if dead:
        x[:, in_features // 2] = 0
    factor, gram = QRFactor(in_features), Gram(in_features)
    for batch in x.split(cuts):
        factor.update(batch)
        gram.update(batch)
    assert factor.num_tokens == gram.num_tokens == num_tokens
    if num_tokens == 0:
        return
    r = factor.factor
    assert r.shape[0] <= min(num_tokens, in_features) and r.shape[1] == in_features
    assert torch.equal(r, r.triu()) and (r.diagonal() >= 0).all()
    torch.testing.assert_close(r.T @ r, gram.sum, rtol=1e-11, atol=1e-11)
    assert torch.equal(factor.factor, r), "reading changes nothing"


def test_the_triangle_is_unique_where_the_inputs_have_full_rank():
    x, _ = spread(700, 20, 1e-2)
    whole, parts = QRFactor(20), QRFactor(20)
    whole.update(x)
    for batch in x.split([1, 298, 300, 101]):
        parts.update(batch)
    torch.testing.assert_close(parts.factor, whole.factor, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(whole.factor, torch.linalg.cholesky(x.T @ x).T, rtol=1e-10, atol=1e-13)


def test_the_factor_keeps_directions_that_the_gram_loses_in_fp32():
    """The Gram's eigenvalues fall by 1e10. It rounds them at eps times the largest, R its singular values at that."""
    x, values = spread(2000, 24, 1e-5, torch.float32)
    factor, gram, exact = QRFactor(24, dtype=torch.float32), Gram(24, dtype=torch.float32), Gram(24)
    for batch in x.split(300):
        for statistic in (factor, gram, exact):
            statistic.update(batch)
    roots = [torch.linalg.eigvalsh(seen.sum.double()).flip(0).clamp(min=0).sqrt() for seen in (gram, exact)]
    worst_of_gram, rounding_of_inputs = (float((root / values - 1).abs().max()) for root in roots)
    worst_of_factor = float((torch.linalg.svdvals(factor.factor.double()) / values - 1).abs().max())
    assert worst_of_gram > 0.5
    assert worst_of_factor < 0.05 and rounding_of_inputs < 0.05


@pytest.mark.parametrize(("in_features", "num_rows"), [(4, 256), (300, 300)])
def test_few_factorisations_are_made(monkeypatch, in_features, num_rows):
    """One for each buffer full of tokens, in however small batches they come."""
    calls, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda a, mode: calls.append(a.shape) or qr(a, mode))
    factor = QRFactor(in_features, dtype=torch.float32)
    for batch in torch.randn(1500, in_features).split(7):
        factor.update(batch)
    assert 0 < len(calls) <= ceil(1500 / num_rows)
    assert set(calls) == {(in_features + num_rows, in_features)}


def test_factors_of_other_parts_are_stacked_and_factored_again():
    """Experts: some saw many tokens, some fewer than there are features, and one none."""
    torch.manual_seed(0)
    pooled, x = QRFactor(30), torch.randn(1200, 30)
    for part in x.split([1000, 0, 7, 193]):
        expert = QRFactor(30)
        expert.update(part)
        pooled.merge(expert)
    wide = x.double()
    assert pooled.num_tokens == 1200
    torch.testing.assert_close(pooled.factor.T @ pooled.factor, wide.T @ wide, rtol=1e-11, atol=1e-11)


def test_a_feature_that_is_always_zero_has_no_norm():
    norms = InputNorms(3)
    norms.update(torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 1.0]]))
    torch.testing.assert_close(norms.rms, torch.tensor([12.5**0.5, 0.0, 1.0], dtype=torch.float64))
