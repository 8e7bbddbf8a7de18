from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.fitting.alps_step import ScaledGram, alps, refit
from tensormix.fitting.output_error import damped, output_error
from tensormix.fitting.sparsegpt_step import inverse_factor, sparsegpt
from tensormix.operators.sparse import GROUPED, PATTERNS, largest, pattern_count


def correlated(out_features, in_features, num_tokens, seed=0):
    """A weight and inputs (N, I) that lie near few directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    x = torch.randn(num_tokens, in_features, generator=generator, dtype=torch.float64)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    return weight, x * torch.logspace(0, -2, in_features, dtype=torch.float64) @ mixing


def count(pattern, shape, density=0.5):
    return round(density * shape[0] * shape[1]) if pattern == "unstructured" else pattern_count(pattern, *shape[::-1])


def least_squares(weight, x, mask):
    """For every row by itself: the values on its support with the smallest error of the outputs x @ row."""
    values = torch.zeros_like(weight)
    for row, kept, out in zip(weight, mask, values, strict=True):
        if kept.any():
            out[kept] = torch.linalg.lstsq(x[:, kept], (x @ row)[:, None], driver="gelsd").solution[:, 0]
    return values


def gram_of(weight, x):
    return ScaledGram.of(x.T @ x, weight.dtype)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 10), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_refit_is_least_squares_on_the_support(out_features, in_features, num_tokens, density, seed):
    """Also with fewer tokens than features, where the values are not unique but the error is."""
    generator = torch.Generator().manual_seed(seed)
    weight, start = torch.randn(2, out_features, in_features, generator=generator, dtype=torch.float64)
    x = torch.randn(num_tokens, in_features, generator=generator, dtype=torch.float64)
    mask = torch.rand(out_features, in_features, generator=generator) < density
    gram = x.T @ x
    values = refit(weight, gram, mask, start, steps=200)
    assert not values[~mask].any()
    scale = float((x @ weight.T).square().sum())
    best = output_error(weight - least_squares(weight, x, mask), gram)
    assert abs(output_error(weight - values, gram) - best) <= 1e-10 * scale


def test_every_step_of_refit_lowers_the_error():
    weight, x = correlated(8, 40, 100)
    mask, gram = largest(weight.abs(), num_values=120), x.T @ x
    errors = [
        output_error(weight - refit(weight, gram, mask, torch.zeros_like(weight), steps=n), gram) for n in range(12)
    ]
    assert all(after < before for before, after in pairwise(errors))


def test_refit_stops_where_it_has_arrived():
    weight, x = correlated(4, 6, 50)
    mask = torch.ones(4, 6, dtype=torch.bool)
    assert torch.equal(refit(weight, x.T @ x, mask, weight, steps=10), weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_values_are_the_least_squares_optimum_on_the_support_that_it_finds(pattern):
    weight, x = correlated(6, 24, 100)
    values, mask = alps(
        weight, gram_of(weight, x), num_values=count(pattern, (6, 24)), pattern=pattern, refit_steps=200
    )
    gradient = (values - weight) @ (x.T @ x)
    assert gradient[mask].abs().max() < 1e-8 * gradient[~mask].abs().max()
    torch.testing.assert_close(values, least_squares(weight, x, mask), rtol=1e-6, atol=1e-6)


def admm_by_hand(weight, gram, num_values, pattern, rho, steps):
    """The iteration as it is written: min over B, D of 1/2 tr((W - B) H (W - B)^T) with B = D and D of the pattern.

    B <- (W H - V + rho D) (H + rho)^-1, D <- projection of B + V / rho, V <- V + rho (B - D), in the units in which
    the diagonal of H is 1; rho grows every three steps by how much of the support has changed.
    """
    scale = gram.diagonal().sqrt()
    weight, gram = weight * scale, gram / scale / scale[:, None]
    identity = torch.eye(len(gram), dtype=gram.dtype)
    b = d = weight
    v, old = torch.zeros_like(weight), None
    for step in range(steps + 1):
        b = torch.linalg.solve(gram + rho * identity, weight @ gram - v + rho * d, left=False)  # W itself at first
        mask = largest((b + v / rho).abs(), num_values=num_values, pattern=pattern)
        d = torch.where(mask, b + v / rho, 0)
        v = v + rho * (b - d)
        if step % 3 == 0:
            changed = 1.0 if old is None else float((mask != old).sum()) / num_values
            if changed == 0:
                break
            if step:
                rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            old = mask
    return mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("max_steps", [1, 2, 5, 300])
def test_the_support_is_that_of_the_iteration_written_out(pattern, max_steps):
    weight, x = correlated(16, 48, 200)
    gram, num_values = damped(x.T @ x, 0.005, 0.01), count(pattern, (16, 48))
    _, mask = alps(
        weight, ScaledGram.of(gram, torch.float64), num_values=num_values, pattern=pattern, max_steps=max_steps
    )
    expected = admm_by_hand(weight, gram, num_values, pattern, 0.1, max_steps)
    start = admm_by_hand(weight, gram, num_values, pattern, 0.1, 0)
    assert not torch.equal(expected, start), "otherwise nothing is shown"
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_uncorrelated_inputs_give_magnitude_pruning(pattern):
    weight, _ = correlated(7, 200, 1)
    num_values = count(pattern, (7, 200))
    scaled = ScaledGram.of(torch.eye(200, dtype=torch.float64), torch.float64)
    values, mask = alps(weight, scaled, num_values=num_values, pattern=pattern)
    assert torch.equal(mask, largest(weight.abs(), num_values=num_values, pattern=pattern))
    torch.testing.assert_close(values, torch.where(mask, weight, 0), rtol=1e-12, atol=0)


def test_inputs_that_differ_in_size_count_by_what_reaches_the_outputs():
    """With a diagonal Gram matrix the optimum is known: the largest |w_j| ||x_j||."""
    weight, _ = correlated(5, 30, 1)
    scale = torch.logspace(-3, 3, 30, dtype=torch.float64)
    values, mask = alps(weight, ScaledGram.of(torch.diag(scale.square()), torch.float64), num_values=60)
    assert torch.equal(mask, largest((weight * scale).abs(), num_values=60))
    torch.testing.assert_close(values, torch.where(mask, weight, 0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_tokens", [400, 40], ids=["many tokens", "fewer tokens than features"])
def test_alps_beats_sparsegpt_beats_magnitude_on_correlated_inputs(pattern, num_tokens):
    weight, x = correlated(32, 64, num_tokens)
    gram, size = x.T @ x, {"num_values": count(pattern, (32, 64)), "pattern": pattern}
    stable = damped(gram, 0.005, 0.01)
    by_alps, _ = alps(weight, ScaledGram.of(stable, torch.float64), **size)
    by_sparsegpt, _ = sparsegpt(weight, inverse_factor(stable), **size)
    by_magnitude = torch.where(largest(weight.abs(), **size), weight, 0)
    first, second, third = (output_error(weight - s, gram) for s in (by_alps, by_sparsegpt, by_magnitude))
    assert first < 0.9 * second < 0.9 * 0.5 * third


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(PATTERNS), st.floats(0, 1), st.integers(0, 9))
def test_the_pattern_and_the_count_are_exact(out_features, groups, pattern, density, seed):
    weight, x = correlated(out_features, 8 * groups, 5, seed)
    x[:, ::3] = 0  # features that are always zero
    if not x.any():
        return
    num_values = max(1, count(pattern, weight.shape, density))
    scaled = ScaledGram.of(damped(x.T @ x, 0.005, 0.01), torch.float32)
    values, mask = alps(weight.float(), scaled, num_values=num_values, pattern=pattern)
    assert int(mask.sum()) == num_values and not values[~mask].any() and values.isfinite().all()
    if pattern in GROUPED:
        kept, size = GROUPED[pattern]
        assert bool((mask.reshape(-1, size).sum(1) == kept).all())
