"""Several mixtures of one input as one operator: the same outputs and gradients as each by itself, in one call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.kernels.mixt import cpu, mixt, mixt_siblings, part_of_cores, reference, siblings, stack_cores


def family(num_tokens, core_bonds, *, K=3, d=2, P=12, cut=0, dtype=torch.float64):
    """Tokens of the padded size less `cut`, and for each core bond c the cores (S c, P) of one sibling."""
    generator = torch.Generator().manual_seed(0)
    S = d ** (K - 1)
    x = torch.randn(num_tokens, P * S - cut, generator=generator, dtype=dtype)
    each = [[torch.randn(S * c, P, generator=generator, dtype=dtype) for _ in range(K)] for c in core_bonds]
    return x, each


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 4),
    st.integers(2, 3),
    st.lists(st.integers(1, 5), min_size=2, max_size=3),
    st.integers(1, 9),
    st.sampled_from([0, 1, 7, 30]),
    st.data(),
)
def test_together_they_are_what_each_is_alone(K, d, core_bonds, P, num_tokens, data):
    S = d ** (K - 1)
    x, each = family(num_tokens, core_bonds, K=K, d=d, P=P, cut=data.draw(st.integers(0, P * S - 1)))
    out_features = [data.draw(st.integers(1, S * c * S)) for c in core_bonds]
    stacked = stack_cores(each, d)
    for most in (0, siblings.MOST):  # one by one, and as one product
        found = siblings.mixt_siblings(x, stacked, d, core_bonds, out_features, cpu.mixt, most)
        for y, cores, O in zip(found, each, out_features, strict=True):
            torch.testing.assert_close(y, reference.mixt(x, cores, d, O), rtol=1e-12, atol=1e-11)


def test_the_stack_is_cut_into_the_very_cores():
    _, each = family(1, (1, 3, 2), K=4)
    stacked, start = stack_cores(each, 2), 0
    for cores, size in zip(each, (1, 3, 2), strict=True):
        assert all(map(torch.equal, part_of_cores(stacked, 2, start, size), cores))
        start += size


@pytest.mark.parametrize("num_tokens", [2, 14])
def test_gradients_and_their_gradients_are_right(num_tokens):
    x, each = family(num_tokens, (2, 1), K=2, P=3, cut=1)
    cores = [core.requires_grad_() for core in stack_cores(each, 2)]

    def call(x, *cores):
        return mixt_siblings(x, cores, 2, (2, 1), (8, 3))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *cores), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *cores), fast_mode=True)


def test_an_output_that_is_not_used_has_no_part_in_the_gradients():
    x, each = family(5, (2, 1, 3))
    leaves = [x.requires_grad_(), *(core.requires_grad_() for cores in each for core in cores)]
    q, _, _ = mixt_siblings(x, stack_cores(each, 2), 2, (2, 1, 3), (32, 16, 45))
    together = torch.autograd.grad(q.square().sum(), leaves)
    alone = torch.autograd.grad(mixt(x, each[0], 2, 32).square().sum(), leaves[:4])
    torch.testing.assert_close(together[:4], alone, rtol=1e-12, atol=1e-11)
    assert not any(grad.any() for grad in together[4:])


def test_opcheck():
    x, each = family(14, (2, 1), cut=3, dtype=torch.float32)
    cores = [core.requires_grad_() for core in stack_cores(each, 2)]
    torch.library.opcheck(mixt_siblings, (x.requires_grad_(), cores, 2, [2, 1], [30, 16]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    x, each = family(20, (2, 1), dtype=torch.float64)
    x, each = x.to(dtype), [[core.to(dtype) for core in cores] for cores in each]
    together = mixt_siblings(x, stack_cores(each, 2), 2, (2, 1), (32, 16))
    for y, cores in zip(together, each, strict=True):
        plain = reference.mixt(x, cores, 2, y.shape[1])
        truth = reference.mixt(x.double(), [core.double() for core in cores], 2, y.shape[1])
        assert (y - truth).norm() <= 2 * (plain - truth).norm()


def test_one_product_up_to_so_many_outputs_and_one_each_beyond():
    x, each = family(6, (2, 1, 1), dtype=torch.float32)
    calls = []

    def counted(rows, cores, bond, out_features):
        calls.append(out_features)
        return cpu.mixt(rows, cores, bond, out_features)

    for most in (6 * 64, 6 * 64 - 1):
        siblings.mixt_siblings(x, stack_cores(each, 2), 2, (2, 1, 1), (32, 16, 15), counted, most)
    assert calls == [64, 32, 16, 15]
