"""Chain, Monarch and Kronecker beyond what every operator owes, and the fit of all numbers together."""

from __future__ import annotations

import pytest
import torch

from tensormix.operators import Chain, Kronecker, LowRank, MixT, Monarch
from tensormix.operators.chain import start_chain
from tensormix.operators.joint_fit import fit_jointly


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(op, seed=0):
    op = op.double()
    with torch.no_grad():
        for index, parameter in enumerate(op.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + index))
    return op


def error(op, weight):
    return float((op.to_dense().detach() - weight).norm() / weight.norm())


def test_the_shuffle_separates_neighbours():
    """Entry a * 2 + b of six, three shuffled: [0 1 2 3 4 5] becomes [0 2 4 1 3 5]."""
    eye = Kronecker.from_dense(torch.eye(6), outer=2)
    shuffled = Chain(factors=[eye, eye], shuffle=3).multiply(torch.arange(6.0))
    assert shuffled.round().tolist() == [0, 2, 4, 1, 3, 5]
    assert Chain(factors=[eye, eye]).multiply(torch.arange(6.0)).round().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_chain_counts_all_its_factors():
    chain = Chain(factors=[MixT(32, 48, num_branches=3), MixT(32, 32, num_branches=3)], shuffle=2)
    assert chain.num_params == 3 * 12 * 8 + 3 * 8 * 8
    assert chain.macs_per_token == 4 * chain.num_params
    assert (chain.in_features, chain.out_features) == (32, 48)


def test_the_start_of_a_chain_is_as_large_as_the_weight():
    chain, weight = Chain(factors=[MixT(32, 48, num_branches=3), MixT(32, 32, num_branches=3)]), 7 * draw(48, 32)
    start_chain(chain, weight, seed=0)
    assert float(chain.to_dense().norm().detach()) == pytest.approx(float(weight.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("operator", "sizes"),
    [(Monarch, {"blocks": 4, "rank": 2}), (Monarch, {"blocks": 2, "rank": 3}), (Kronecker, {"outer": 6})],
)
def test_what_has_the_structure_is_found_again(operator, sizes):
    O = 48 if operator is Kronecker else 80
    weight = filled(operator(48, O, **sizes)).to_dense().detach()
    assert error(operator.from_dense(weight, **sizes), weight) < 1e-12


def test_monarch_of_one_block_is_the_truncated_svd():
    weight = draw(40, 24)
    monarch, low_rank = Monarch.from_dense(weight, blocks=1, rank=5), LowRank.from_dense(weight, rank=5)
    torch.testing.assert_close(monarch.to_dense(), low_rank.to_dense())


def test_monarch_blocks_are_those_of_its_definition():
    """A weight whose (α, β) slices W[(c, β), (α, d)] have rank 1, and which as a matrix has a far larger one."""
    slices = torch.einsum("abc,abd->cbad", draw(4, 4, 20), draw(4, 4, 12, seed=1)).reshape(80, 48)
    assert error(Monarch.from_dense(slices, blocks=4), slices) < 1e-12
    assert error(LowRank.from_dense(slices, rank=4), slices) > 0.5
    other = torch.einsum("abc,abd->bcad", draw(4, 4, 20), draw(4, 4, 12, seed=1)).reshape(80, 48)
    assert error(Monarch.from_dense(other, blocks=4), other) > 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_the_joint_fit_of_a_low_rank_ends_at_the_truncated_svd(seed):
    """Its only valleys are the optimum, on whitened inputs as well."""
    weight, root = draw(20, 16, seed=seed), draw(16, 12, seed=7)
    for right in (None, root):
        op = filled(LowRank(16, 20, rank=4), seed)
        calls, reached = fit_jointly(op, weight, right, steps=500)
        values = torch.linalg.svdvals(weight if right is None else weight @ right)
        assert reached == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)
        assert 1 < calls and all(p.grad is None for p in op.parameters())


def test_a_joint_fit_never_ends_worse_than_it_began():
    op, weight = LowRank.from_dense(draw(20, 16), rank=4), draw(20, 16)
    before = error(op, weight)
    assert fit_jointly(op, weight, None, steps=3)[1] <= before + 1e-12
    with torch.no_grad():
        op.left.mul_(1e200)  # the line search overflows
    values = op.left.clone()
    fit_jointly(op, weight, None, steps=3)
    assert op.left.isfinite().all() and (op.left.norm() <= values.norm() or torch.equal(op.left, values))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Chain(factors=[]), r"Chain: needs one or more factors, got none"),
        (
            lambda: Chain(factors=[LowRank(8, 4, rank=1), LowRank(4, 6, rank=1)]),
            r"Chain: a factor with 8 inputs cannot follow one with 6 outputs",
        ),
        (
            lambda: Chain(factors=[LowRank(8, 4, rank=1), LowRank(4, 8, rank=1)], shuffle=3),
            r"Chain: shuffle must divide the 8 values between two factors, got 3",
        ),
        (lambda: Monarch(48, 80, blocks=5), r"Monarch: blocks must divide both sizes of a 48x80 layer, got 5"),
        (lambda: Monarch(48, 80, blocks=4, rank=13), r"Monarch: rank must be in 1\.\.12 for 4 blocks .* got 13"),
        (lambda: Kronecker(48, 80, outer=4), r"Kronecker: outer must divide the size of a square layer, got outer=4"),
        (lambda: Kronecker(48, 48, outer=5), r"Kronecker: outer must divide the size of a square layer, got outer=5"),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
