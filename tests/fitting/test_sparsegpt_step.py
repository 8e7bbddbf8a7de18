from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.fitting import sparsegpt_step
from tensormix.fitting.output_error import damped, output_error
from tensormix.fitting.sparsegpt_step import inverse_factor, sparsegpt
from tensormix.operators.sparse import GROUPED, PATTERNS, largest, pattern_count


def correlated(out_features, in_features, num_tokens, seed=0):
    """A weight and the Gram matrix of inputs that lie near few directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    x = torch.randn(num_tokens, in_features, generator=generator, dtype=torch.float64)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, in_features, dtype=torch.float64) @ mixing
    return weight, x.T @ x


def count(pattern, shape, density=0.5):
    return round(density * shape[0] * shape[1]) if pattern == "unstructured" else pattern_count(pattern, *shape[::-1])


def surgeon(weight, gram, mask):
    """One column after the other, and for each the update of the optimal brain surgeon, straight from its formula."""
    weight = weight.clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(gram[j:, j:])
        removed = torch.where(mask[:, j], 0, weight[:, j])
        weight[:, j:] -= removed[:, None] * inverse[0] / inverse[0, 0]
    return torch.where(mask, weight, 0)


def test_the_factor_is_that_of_the_inverse():
    _, gram = correlated(1, 20, 60)
    factor = inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ gram, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [16, 128])
def test_every_zero_is_made_up_for_as_the_optimal_brain_surgeon_does(pattern, block, monkeypatch):
    monkeypatch.setattr(sparsegpt_step, "BLOCK", block)
    weight, gram = correlated(6, 40, 100)
    gram = damped(gram, 0.005, 0.01)
    values, mask = sparsegpt(weight, inverse_factor(gram), num_values=count(pattern, (6, 40)), pattern=pattern)
    torch.testing.assert_close(values, surgeon(weight, gram, mask), rtol=1e-8, atol=1e-8)


def test_where_all_zeros_come_first_the_rest_is_the_least_squares_optimum():
    weight, gram = correlated(5, 12, 60)
    weight[:, :6] *= 1e-6  # so small that they go
    values, mask = sparsegpt(weight, inverse_factor(gram), num_values=30)
    assert torch.equal(mask, (torch.arange(12) >= 6).expand(5, 12))
    solution = torch.linalg.solve(gram[6:, 6:], gram[6:] @ weight.T).T
    torch.testing.assert_close(values[:, 6:], solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_uncorrelated_inputs_give_magnitude_pruning_in_every_block(pattern):
    weight, _ = correlated(7, 200, 1)
    values, mask = sparsegpt(
        weight, torch.eye(200, dtype=torch.float64), num_values=count(pattern, (7, 200)), pattern=pattern
    )
    for start, stop in ((0, 128), (128, 200)):
        part = weight[:, start:stop]
        expected = largest(part.abs(), num_values=count(pattern, part.shape), pattern=pattern)
        assert torch.equal(mask[:, start:stop], expected)
    assert torch.equal(values, torch.where(mask, weight, 0))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_tokens", [400, 10], ids=["many tokens", "fewer tokens than features"])
def test_it_beats_magnitude_on_correlated_inputs(pattern, num_tokens):
    weight, gram = correlated(32, 64, num_tokens)
    num_values = count(pattern, (32, 64))
    values, _ = sparsegpt(weight, inverse_factor(damped(gram, 0.005, 0.01)), num_values=num_values, pattern=pattern)
    magnitude = torch.where(largest(weight.abs(), num_values=num_values, pattern=pattern), weight, 0)
    assert output_error(weight - values, gram) < 0.5 * output_error(weight - magnitude, gram)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 300), st.floats(0, 1), st.integers(0, 9))
def test_the_count_is_exact_for_every_shape(out_features, in_features, density, seed):
    weight, gram = correlated(out_features, in_features, 5, seed)
    num_values = max(1, round(density * out_features * in_features))
    values, mask = sparsegpt(weight, inverse_factor(damped(gram, 0.005, 0.01)), num_values=num_values)
    assert int(mask.sum()) == num_values and not values[~mask].any() and values.isfinite().all()


@pytest.mark.parametrize("pattern", GROUPED)
def test_the_pattern_holds_with_features_that_are_always_zero(pattern):
    weight, gram = correlated(9, 136, 20)
    dead = torch.arange(136) % 5 == 0
    gram[dead] = 0
    gram[:, dead] = 0
    kept, size = GROUPED[pattern]
    factor = inverse_factor(damped(gram, 0.005, 0.01))
    values, mask = sparsegpt(weight, factor, num_values=count(pattern, (9, 136)), pattern=pattern)
    assert bool((mask.reshape(-1, size).sum(1) == kept).all()) and values.isfinite().all()
    assert mask[:, dead].sum() < mask[:, ~dead].sum() / 4, "places should go to inputs that carry something"
