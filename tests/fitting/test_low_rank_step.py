from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.fitting.low_rank_step import low_rank_step
from tensormix.fitting.output_error import output_error

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def problem(out_features, in_features, num_tokens, seed=0):
    """A weight, and X^T for inputs X (N, I): X^T X = root root^T."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    x = torch.randn(num_tokens, in_features, generator=generator, dtype=torch.float64)
    return weight, x @ torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)


def root_of(x):
    values, vectors = torch.linalg.eigh(x.T @ x)
    return vectors * values.clamp_min(0).sqrt()


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 20), st.integers(1, 12), st.integers(0, 99))
def test_the_error_is_the_discarded_spectrum_and_no_rank_does_better(shape, num_tokens, rank, seed):
    weight, x = problem(*shape, num_tokens, seed)
    rank = min(rank, *shape)
    left, right = low_rank_step(weight, root_of(x), rank)
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    optimum = torch.linalg.svdvals(weight @ x.T)[rank:].square().sum()  # Eckart and Young, on the outputs
    error = output_error(weight - left @ right, x.T @ x)
    assert abs(error - float(optimum)) <= 1e-12 * float((weight @ x.T).square().sum())
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_it_is_the_published_closed_form(shape):
    """H = V L V^T, P = L^(1/2) V^T W^T, (B A)^T = V L^(-1/2) P_r."""
    weight, x = problem(*shape, 30)
    values, vectors = torch.linalg.eigh(x.T @ x)
    u, s, vh = torch.linalg.svd(values.sqrt()[:, None] * (vectors.T @ weight.T), full_matrices=False)
    published = (vectors / values.sqrt()) @ (u[:, :2] * s[:2]) @ vh[:2]
    left, right = low_rank_step(weight, root_of(x), 2)
    torch.testing.assert_close(left @ right, published.T, rtol=1e-9, atol=1e-9)


def test_without_data_it_is_the_truncated_svd():
    weight, _ = problem(6, 9, 1)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    left, right = low_rank_step(weight, torch.eye(9, dtype=torch.float64), 3)
    torch.testing.assert_close(left @ right, u[:, :3] * s[:3] @ vh[:3])


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_fp32_finds_directions_whose_square_is_below_its_rounding(shape):
    """Singular values from 1 down to 1e-6: the eigenvalues reach 1e-12, and fp32 ends at 1e-7 of the largest."""
    weight, _ = problem(*shape, 1)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    weight = (u[:, :4] * torch.tensor([1, 1e-2, 1e-4, 1e-6], dtype=torch.float64)) @ vh[:4]
    left, right = low_rank_step(weight.float(), torch.eye(shape[1]), 3)
    assert left.dtype == right.dtype == torch.float32
    assert (weight - left.double() @ right.double()).norm() < 2e-6  # 1e-6 is the optimum, fp32 products add 1e-7
