"""What every statistic owes, over the whole table."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import tensormix.statistics
from tensormix.statistics import (
    STATISTICS,
    Gram,
    HeldOutGram,
    InputMagnitudes,
    InputMean,
    InputNorms,
    QRFactor,
    TokenSum,
)

KINDS = list(STATISTICS.values())
WHOLE = [kind for kind in KINDS if kind is not HeldOutGram]  # that take every token


def value(statistic):
    return statistic.factor if isinstance(statistic, QRFactor) else statistic.sum


def test_the_table_holds_every_statistic_that_is_written():
    written = [
        n for n in ast.parse(Path(tensormix.statistics.__file__).read_text()).body if isinstance(n, ast.ClassDef)
    ]
    names = {cls.name for cls in written} - {"Statistic", "TokenSum"}
    assert names == set(STATISTICS)
    assert all(
        kind.__name__ == name and kind.stream in ("walk", "dense", "propagated") for name, kind in STATISTICS.items()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_batches_may_be_cut_anywhere(kind, dtype):
    """The parts must give what the whole gives, up to the rounding of fp64."""
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 8) * 100).to(dtype)
    whole, parts = kind(8), kind(8)
    whole.update(x)
    parts.update(x[:2])
    parts.update(x[2:2])
    parts.update(x[2])
    parts.update(x[3:].reshape(-1, 8)[:1])
    parts.update(x[3:].reshape(-1, 8)[1:])
    assert parts.num_tokens == whole.num_tokens == 30
    assert value(whole).dtype == torch.float64
    torch.testing.assert_close(value(parts), value(whole), rtol=1e-12, atol=1e-10)
    if isinstance(whole, TokenSum):
        torch.testing.assert_close(parts.mean, whole.sum / 30, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_having_seen_both(kind):
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    whole, left, right, none = kind(8), kind(8), kind(8), kind(8)
    whole.update(x)
    left.update(x[:20])
    right.update(x[20:])
    before = value(right).clone()
    left.merge(right)
    left.merge(none)
    none.merge(left)
    for merged in (left, none):
        assert merged.num_tokens == 50
        torch.testing.assert_close(value(merged), value(whole), rtol=1e-12, atol=1e-12)
    assert torch.equal(value(right), before) and right.num_tokens == 30


@pytest.mark.parametrize("kind", KINDS)
def test_what_differs_cannot_be_merged(kind):
    other = InputMean(8) if kind is Gram else Gram(8)
    for wrong in (kind(7), kind(8, dtype=torch.float32), other):
        with pytest.raises(
            ValueError, match=rf"this is {kind.__name__}\(8, torch.float64\), the other is \w+\([78], torch"
        ):
            kind(8).merge(wrong)


def test_they_are_what_their_names_say():
    x = torch.randn(17, 8)
    mean, norms, gram, factor = InputMean(8), InputNorms(8), Gram(8), QRFactor(8)
    for statistic in (mean, norms, gram, factor):
        statistic.update(x)
    wide = x.double()
    torch.testing.assert_close(mean.mean, wide.mean(0))
    torch.testing.assert_close(norms.rms, wide.norm(dim=0) / 17**0.5)
    torch.testing.assert_close(gram.sum, wide.T @ wide)
    torch.testing.assert_close(factor.factor.T @ factor.factor, wide.T @ wide)


def test_many_small_numbers_are_not_lost_beside_a_large_one():
    """In fp32 adding 1 to 2^25 changes nothing."""
    mean = InputMean(1)
    mean.update(torch.tensor([[2.0**25]]))
    for _ in range(10):
        mean.update(torch.ones(1, 1))
    assert mean.sum.item() == 2**25 + 10


@pytest.mark.parametrize("kind", WHOLE)
def test_the_precision_is_stated(kind):
    """Products are in the stated dtype too: a bf16 input of 1 + 2^-7 has a square that bf16 cannot hold."""
    for dtype in (torch.float32, torch.float64):
        statistic = kind(1, dtype=dtype)
        statistic.update(torch.full((1, 1), 1 + 2**-7, dtype=torch.bfloat16))
        assert value(statistic).dtype == dtype
        exact = 1 + 2**-7 if kind in (InputMean, InputMagnitudes, QRFactor) else (1 + 2**-7) ** 2
        assert value(statistic).item() == exact
    for narrow in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: dtype must be torch.float64 or torch.float32, got {narrow}"
        ):
            kind(1, dtype=narrow)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("in_features", [1, 5, 300])
def test_a_walk_can_rely_on_the_bytes(kind, dtype, in_features):
    statistic = kind(in_features, None, dtype)
    for num_tokens in (0, 3, 2000):
        statistic.update(torch.zeros(num_tokens, in_features))
        tensors = [held for held in vars(statistic).values() if isinstance(held, torch.Tensor)]
        storages = sum(held.untyped_storage().nbytes() for held in tensors)
        assert storages == kind.bytes_needed(in_features, dtype)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 7])
def test_what_is_not_finite_is_noticed(kind, bad, position):
    """Also long after it came, and in the last feature, which the triangle of a QR factor has in one column only."""
    statistic, x = kind(8), torch.randn(600, 8)
    statistic.update(x)
    assert statistic.is_finite
    x[3, position] = bad
    statistic.update(x)
    assert not statistic.is_finite
    statistic.update(torch.randn(600, 8))
    assert not statistic.is_finite


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_with_gradients_leave_no_graph_behind(kind):
    seen = kind(3)
    seen.update(torch.ones(2, 3, requires_grad=True))
    assert not value(seen).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_is_an_error(kind):
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: no tokens were seen; did calibration run through this site"
    ):
        _ = kind(3).factor if kind is QRFactor else kind(3).mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 7), (8, 4), ()])
def test_inputs_of_another_width_are_refused(kind, shape):
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: inputs must be \(\.\.\., 8\), got shape \({', '.join(map(str, shape))}"
    ):
        kind(8).update(torch.ones(shape))


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.float64], ids=str)
def test_an_eighth_of_the_tokens_is_held_out_and_the_rest_is_the_difference(given, held):
    torch.manual_seed(0)
    x = torch.randn(4000, 3).to(given)
    whole, out = Gram(3, dtype=held), HeldOutGram(3, dtype=held)
    whole.update(x)
    out.update(x)
    assert 0.11 < float(out.sum.trace() / whole.sum.trace()) < 0.14
    alone = [HeldOutGram(3, dtype=held) for _ in x]
    for statistic, token in zip(alone, x, strict=True):
        statistic.update(token)
    picked = torch.tensor([bool(statistic.sum.any()) for statistic in alone])
    torch.testing.assert_close(out.sum, (x[picked].to(held).T @ x[picked].to(held)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.sum - out.sum, x[~picked].to(held).T @ x[~picked].to(held), rtol=1e-4, atol=1e-3)
