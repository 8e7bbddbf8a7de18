from __future__ import annotations

import pytest
import torch

from tensormix.operators import LowRank, Remapped, build
from tensormix.storage.bits import stored_bits

SHAPES = [(80, 48), (48, 80), (48, 48)]  # (O, I)


def low_rank(O, I, rank=5, dtype=torch.float32):
    torch.manual_seed(0)
    return LowRank.from_dense(torch.randn(O, I, dtype=dtype), rank=rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_number_moves_by_more_than_half_its_scale(shape):
    """Component by component: the longer factor is exact beyond what the shorter one is long."""
    factors = low_rank(*shape, dtype=torch.float64)
    op = Remapped.of(factors)
    left, right = op.factors(torch.float64)
    u, s, vh = torch.linalg.svd(factors.to_dense(), full_matrices=False)
    exact = (u[:, :5] * s[:5].sqrt(), s[:5, None].sqrt() * vh[:5])
    signs = (left * exact[0]).sum(0).sign()
    short = min(shape)
    for ours, theirs in ((left.T, (exact[0] * signs).T), (right, exact[1] * signs[:, None])):  # (R, O), (R, I)
        scales = theirs[:, :short].abs().amax(1, keepdim=True) / 127
        assert ((ours - theirs)[:, :short].abs() <= scales * (0.5 + 127 / 256)).all()  # and the scale's own rounding
        torch.testing.assert_close(ours[:, short:], theirs[:, short:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bits_are_those_of_the_formula(shape, dtype):
    op, R, D = Remapped.of(low_rank(*shape, dtype=dtype)), 5, min(shape)
    bits = 2 * 8 * D * R + 2 * 16 * R + 8 * dtype.itemsize * (max(shape) - D) * R
    assert op.num_bits == bits == stored_bits(op) == stored_bits(build(op.spec).to(dtype))
    assert op.num_params == R * sum(shape) == low_rank(*shape).num_params
    if dtype == torch.bfloat16:
        assert bits == R * (16 * max(shape) + 32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)], ids=str)
def test_forward_is_the_dense_product(shape, dtype, tolerance):
    op = Remapped.of(low_rank(*shape)).to(dtype)
    op.bias = torch.nn.Parameter(torch.randn(shape[0], dtype=dtype))
    x = torch.randn(3, 7, shape[1], dtype=dtype)
    expected = (x.double() @ op.double().to_dense().T + op.bias).to(dtype)
    assert ((op.to(dtype)(x) - expected).norm() / expected.norm()).item() < tolerance
    assert op.longer.scales.dtype == torch.bfloat16


def test_it_comes_back_from_its_state():
    op = Remapped.of(low_rank(80, 48))
    again = build(op.spec)
    again.load_state_dict(op.state_dict())
    assert torch.equal(again.to_dense(), op.to_dense())
    assert {n for n, p in op.named_parameters()} == {"rest"} and not list(Remapped.of(low_rank(8, 8, 2)).parameters())


def test_factors_that_are_zero_or_not_finite():
    op = low_rank(8, 6, 2)
    with torch.no_grad():
        op.left.zero_()
        assert not Remapped.of(op).to_dense().any()
        op.left.fill_(torch.inf)
    with pytest.raises(ValueError, match="Remapped: the factors hold NaN or infinite values"):
        Remapped.of(op)
    with pytest.raises(ValueError, match=r"Remapped: rank must be in 1\.\.6 for a 6x8 layer, got 7"):
        Remapped(6, 8, rank=7)
