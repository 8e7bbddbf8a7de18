"""Hybrids, chains and bases: each finds the weight that is made of it, where its rivals at equal numbers cannot."""

from __future__ import annotations

import pytest
import torch

from fitted import draw
from tensormix.fitting.low_rank_step import low_rank_step
from tensormix.fitting.mixt_normal import MixtNormal
from tensormix.methods import (
    Mixt,
    MixtChain,
    MixtLowRank,
    MixtRotated,
    MixtSparse,
    MonarchMethod,
    SvdLlm,
    split_search,
)
from tensormix.methods.mixt_hybrid import alternate
from tensormix.operators import Chain, Kronecker, LowRank, MixT, Monarch, Sum
from tensormix.statistics import Gram

O, I = 64, 48


def planted(op, seed=0):
    """The matrix of an operator with random numbers."""
    with torch.no_grad():
        for index, parameter in enumerate(op.double().parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + index))
    return op.to_dense().detach()


@pytest.fixture(scope="module")
def x():
    scales = torch.logspace(0, -1.5, I, dtype=torch.float64)
    return draw(200, I) * scales @ torch.linalg.qr(draw(I, I, seed=1)).Q


@pytest.fixture(scope="module")
def stats(x):
    gram = Gram(I)
    gram.update(x)
    return {Gram: gram}


def relative_error(weight, op, x):
    return float((x @ (weight - op.to_dense().detach().double()).T).norm() / (x @ weight.T).norm())


def test_a_mixture_and_a_low_rank_are_found_together(x, stats):
    mixture, factors = planted(MixT(I, O, num_branches=3)), planted(LowRank(I, O, rank=2), seed=5)
    weight = mixture / mixture.norm() + factors / factors.norm()
    hybrid = MixtLowRank(keep=0.27, num_branches=3, rounds=100, tolerance=1e-5)
    op, facts = hybrid.fit_with_facts(weight, stats)
    assert [type(term) for term in op.terms] == [MixT, LowRank] and op.terms[1].rank == 2
    assert facts["output_error"] == pytest.approx(relative_error(weight, op, x), abs=1e-6)
    alone = [Mixt(num_branches=2, init="aware").fit(weight, stats), SvdLlm(keep=0.27).fit(weight, stats)]
    assert facts["output_error"] < 0.2 * min(relative_error(weight, other, x) for other in alone)


def test_no_round_of_a_mixture_and_a_low_rank_raises_the_error(stats):
    gram, weight = stats[Gram].mean, draw(O, I)
    root = torch.linalg.cholesky(gram)

    def step(target):
        left, right = low_rank_step(target, root, 3)
        return left @ right, (left, right)

    normal = MixtNormal(MixT(I, O, num_branches=3).double(), gram)
    best, errors = alternate(normal, weight, step, rounds=8, tolerance=0.0)
    assert len(errors) == 8 and best.error == errors[-1] and errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.99 * errors[0], "turns pay"


def test_a_hybrid_is_no_worse_than_either_of_its_terms(x, stats):
    weight = draw(O, I)
    op = MixtLowRank(keep=0.3, num_branches=3).fit(weight, stats)
    parts = [Mixt(num_branches=3, init="aware"), SvdLlm(keep=op.terms[1].num_params / weight.numel())]
    assert relative_error(weight, op, x) < min(relative_error(weight, part.fit(weight, stats), x) for part in parts)


def test_large_entries_go_to_the_sparse_term(x, stats):
    weight = planted(MixT(I, O, num_branches=3))
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))[:30]
    weight.view(-1)[places] += 30.0
    op, facts = MixtSparse(keep=0.2, num_branches=3).fit_with_facts(weight, stats)
    assert isinstance(op, Sum) and op.terms[1].num_values == int(0.2 * O * I) - op.terms[0].num_params
    assert op.terms[1].mask.view(-1)[places].all()
    assert facts["output_error"] == pytest.approx(relative_error(weight, op, x), abs=1e-6)
    assert facts["output_error"] < 0.1 * relative_error(
        weight, Mixt(num_branches=3, init="aware").fit(weight, stats), x
    )


def test_the_data_choose_the_split(stats):
    """A weight of low rank wants few numbers in the mixture, a mixture wants them all."""
    hybrid = MixtLowRank(keep=0.6, num_branches=1, rounds=20)
    for weight, best in ((planted(LowRank(I, O, rank=6)), 3), (planted(MixT(I, O, num_branches=2)), 2)):
        errors = split_search(hybrid, weight, stats)
        assert list(errors) == [2, 3], "one branch is the whole layer, four do not fit into it"
        assert min(errors, key=errors.__getitem__) == best


def test_a_chain_finds_a_chain_where_a_low_rank_cannot(x, stats):
    factors = [MixT(I, O, num_branches=3), MixT(I, I, num_branches=3)]
    weight = planted(Chain(factors=factors, shuffle=2))
    op, facts = MixtChain(num_branches=3, num_factors=2).fit_with_facts(weight, stats)
    assert op.spec == Chain(factors=factors, shuffle=2).spec
    rival = SvdLlm(keep=1.2 * op.num_params / weight.numel()).fit(weight, stats)
    assert rival.num_params >= op.num_params
    assert facts["output_error"] == pytest.approx(relative_error(weight, op, x), abs=1e-6)
    assert facts["output_error"] < 0.8 * relative_error(weight, rival, x)


def test_shuffles_and_seeds_change_a_chain(stats):
    weight, first = draw(O, I), MixtChain(num_branches=3, num_factors=2, steps=5)
    again = [first.model_copy(update=change).fit(weight, stats) for change in ({}, {"shuffle": 1}, {"seed": 1})]
    dense = [op.to_dense().detach() for op in (first.fit(weight, stats), *again)]
    assert torch.equal(dense[0], dense[1])
    assert not torch.allclose(dense[0], dense[2]) and not torch.allclose(dense[0], dense[3])


def test_rotations_lower_the_error_of_the_same_mixture(x, stats):
    def basis(size, seed):
        parts = [torch.linalg.qr(draw(n, n, seed=seed + n)).Q for n in (8, size // 8)]
        return torch.kron(*parts)

    weight = basis(O, 0) @ planted(MixT(I, O, num_branches=3)) @ basis(I, 1)
    op, facts = MixtRotated(num_branches=3).fit_with_facts(weight, stats)
    assert [type(factor) for factor in op.factors] == [Kronecker, MixT, Kronecker]
    assert facts["output_error"] == pytest.approx(relative_error(weight, op, x), abs=1e-6)
    plain = relative_error(weight, Mixt(num_branches=3, init="aware").fit(weight, stats), x)
    assert facts["output_error"] < 0.8 * plain
    few = MixtRotated(num_branches=3, steps=1).fit(draw(O, I), stats)
    aware = Mixt(num_branches=3, init="aware").fit(draw(O, I), stats)
    assert relative_error(draw(O, I), few, x) <= relative_error(draw(O, I), aware, x) * (1 + 1e-9)


def test_monarch_is_no_worse_than_its_projection_and_with_one_block_the_best_low_rank(x, stats):
    weight = draw(O, I)
    op = MonarchMethod(keep=0.3, blocks=4).fit(weight, stats)
    assert (op.blocks, op.rank, op.num_params) == (4, 2, 8 * (O + I))
    assert relative_error(weight, op, x) < relative_error(weight, Monarch.from_dense(weight, blocks=4, rank=2), x)
    one = MonarchMethod(keep=0.3, blocks=1, steps=500).fit(weight, stats)
    best = relative_error(weight, SvdLlm(keep=0.3).fit(weight, stats), x)
    assert relative_error(weight, one, x) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            MixtLowRank(keep=0.2, num_branches=3),
            r"MixtLowRank: a mixture of 3 branches stores 576 of the 3072 numbers of a 48x64 layer and the other "
            r"term at least 112, but keep=0\.2 leaves 38 for it; keep more, or take more branches\.",
        ),
        (MixtSparse(keep=0.1, num_branches=3), r"MixtSparse: .* at least 1, but keep=0\.1 leaves 0 for it"),
        (MixtLowRank(keep=0.9, num_branches=7), r"MixT: num_branches=7 is too large .* the largest possible is 3\."),
        (MixtChain(num_branches=3, shuffle=5), r"Chain: shuffle must divide the 48 values"),
        (MixtRotated(num_branches=3, outer=5), r"Kronecker: outer must divide"),
        (MonarchMethod(keep=0.1, blocks=4), r"Monarch: keep=0\.1 leaves no rank for 4 blocks .* is 0\.1459\."),
    ],
)
def test_errors_say_what_is_allowed(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        method.empty(I, O)


@pytest.mark.parametrize(
    "method",
    [
        MixtLowRank(keep=0.3, num_branches=3),
        MixtSparse(keep=0.3, num_branches=3),
        MixtChain(num_branches=3),
        MixtRotated(num_branches=3),
        MonarchMethod(keep=0.3),
    ],
    ids=lambda method: method.name,
)
def test_inputs_of_zero_are_refused(method):
    empty = Gram(I)
    empty.update(torch.zeros(5, I))
    with pytest.raises(ValueError, match="the calibration inputs are all zero"):
        method.fit(torch.randn(O, I), {Gram: empty})
