"""One mixture for siblings that read the same inputs, stacked along the core bond of the outputs, is theirs apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.methods import Mixt
from tensormix.operators import MixT
from tensormix.statistics import Gram

BOND = 2


def stacked(weights, passed):  # (O_i, I) each -> (sum of O_i, I)
    """Rows (left bonds, core bond, right bonds): one sibling after another along the core bond."""
    parts = [weight.view(passed, -1, passed, weight.shape[1]) for weight in weights]
    return torch.cat(parts, 1).flatten(0, 2)


def case(num_branches, cores, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    passed = BOND ** (num_branches - 1)
    I = 3 * passed**2
    weights = [torch.randn(core * passed**2, I, generator=generator, dtype=torch.float64) for core in cores]
    scale = torch.logspace(0, -2, I, dtype=torch.float64)
    inputs = torch.randn(max(1, int(rank * I)), I, generator=generator, dtype=torch.float64) * scale
    gram = Gram(I)
    gram.update(inputs)
    return weights, gram, passed


@settings(max_examples=5, deadline=None)
@given(
    num_branches=st.integers(2, 3),
    cores=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    init=st.sampled_from(["aware", "matched"]),
    rank=st.sampled_from([0.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_fitted_together_they_are_what_they_are_apart(num_branches, cores, init, rank, seed):
    """Also with fewer tokens than features; every row of the core bond is a least-squares problem of its own."""
    weights, gram, passed = case(num_branches, cores, rank, seed)
    method = Mixt(num_branches=num_branches, init=init, tolerance=0, max_steps=500)
    apart = [method.fit(weight, {Gram: gram}) for weight in weights]
    together = method.fit(stacked(weights, passed), {Gram: gram})
    expected, found = stacked([one.to_dense().detach() for one in apart], passed), together.to_dense().detach()
    assert together.num_params == sum(one.num_params for one in apart)
    assert together.macs_per_token == sum(one.macs_per_token for one in apart)
    moved = (found - expected) @ gram.mean
    assert float(moved.norm() / (expected @ gram.mean).norm()) < 1e-6
    if rank > 1 or init == "matched":
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_cores_apart_stacked_are_the_cores_of_all():
    """So mixtures of siblings, fitted one by one, can be run as one without a new fit."""
    weights, gram, passed = case(3, [1, 2], 2.0, 0)
    apart = [Mixt(num_branches=3).fit(weight, {Gram: gram}) for weight in weights]
    together = MixT(weights[0].shape[1], sum(len(weight) for weight in weights), num_branches=3).to(weights[0])
    with torch.no_grad():
        for k, core in enumerate(together.cores):
            left = BOND ** (2 - k)  # output bonds of the window before the core bond; BOND**k are behind it
            parts = [one.cores[k].view(left, -1, BOND**k, core.shape[1]) for one in apart]
            core.copy_(torch.cat(parts, 1).flatten(0, 2))
    torch.testing.assert_close(together.to_dense(), stacked([one.to_dense() for one in apart], passed))


@pytest.mark.parametrize("init", ["aware", "matched"])
def test_one_after_another_along_the_leading_bond_is_another_structure(init):
    weights, gram, _ = case(2, [2, 2], 2.0, 1)
    method = Mixt(num_branches=2, init=init, tolerance=0, max_steps=500)
    expected = torch.cat([method.fit(weight, {Gram: gram}).to_dense().detach() for weight in weights])
    other = method.fit(torch.cat(weights), {Gram: gram}).to_dense().detach()
    assert float((other - expected).norm() / expected.norm()) > 0.1
