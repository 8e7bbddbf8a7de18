"""Tensor trains beside a few entries, and head by head."""

from __future__ import annotations

import pytest
import torch

from tensormix.methods import DenseSparseTt, PerHeadTt, TensorTrainMethod
from tensormix.methods.base import Heads, Layer, RoleError
from tensormix.operators import TensorTrain
from tensormix.statistics import Gram, InputNorms

DOUBLE = {"dtype": torch.float64}
O, I = 40, 48
HEADS = Heads(4, 2, 8)
SHAPES = {"q": (32, 24), "k": (16, 24), "v": (16, 24), "o": (24, 32)}


def train(seed=0):
    """A weight that is a train of rank 3."""
    drawn = torch.Generator().manual_seed(seed)
    cores = [torch.randn(shape, generator=drawn, **DOUBLE) for shape in ((1, 2, 3, 3), (3, 4, 4, 3), (3, 5, 4, 1))]
    return TensorTrain.from_cores(cores[0], cores).to_dense().detach()


def test_spikes_on_a_train_are_found_and_the_train_beneath_is_exact():
    weight = train()
    places = [(0, 0), (7, 31), (39, 47), (20, 5)]
    for place in places:
        weight[place] = 0  # what is taken out leaves zeros, which are of the train only by chance
    spiked = weight.clone()
    for sign, place in enumerate(places):
        spiked[place] = 500 * (-1) ** sign
    method = DenseSparseTt(rank=3, modes=3, share=4.5 / (O * I))
    fitted = method.fit(spiked, {})
    sparse, rest = fitted.terms
    found = sparse.to_dense().detach()
    assert {tuple(place) for place in found.nonzero().tolist()} == set(places)
    assert all(found[place] == spiked[place] for place in places)
    alone = TensorTrainMethod(rank=3, modes=3).fit(weight, {})
    torch.testing.assert_close(rest.to_dense(), alone.to_dense())
    beside = TensorTrainMethod(rank=3, modes=3).fit(spiked, {})
    assert (fitted.to_dense() - spiked).norm() < 0.2 * (beside.to_dense() - spiked).norm()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_activation_selector_takes_what_moves_the_outputs(weighted):
    """A smaller entry at a far larger input goes first."""
    weight, inputs = train(), torch.randn(50, I, **DOUBLE)
    weight[3, 7], weight[5, 11] = 300.0, 100.0
    inputs[:, 11] *= 1e4
    stats = {kind: kind(I) for kind in (Gram, InputNorms)}
    for statistic in stats.values():
        statistic.update(inputs)
    by_size = DenseSparseTt(rank=3, modes=3).fit(weight, {})
    method = DenseSparseTt(rank=3, modes=3, selector="activation", weighted=weighted, steps=3)
    by_activation = method.fit(weight, stats)
    assert by_size.terms[0].to_dense().nonzero().tolist() == [[3, 7]]
    assert by_activation.terms[0].to_dense().nonzero().tolist() == [[5, 11]]
    assert method.needs == ((Gram,) if weighted else (InputNorms,))


def test_the_published_share_keeps_45_entries_and_keep_counts_both_terms():
    op = DenseSparseTt(rank=64).empty(11008, 4096)
    assert [term.num_params for term in op.terms] == [45, 113_108]
    for keep in (0.1, 0.3):
        assert DenseSparseTt(keep=keep, share=0.05).empty(1536, 576).num_params <= keep * 1536 * 576
    with pytest.raises(ValueError, match=r"dense_sparse_tt: keep=0.01 leaves no rank .* smallest usable keep is 0\.0"):
        DenseSparseTt(keep=0.01, share=0.02).empty(1536, 576)


def layers():
    drawn = torch.Generator().manual_seed(0)
    return {role: Layer(torch.randn(shape, generator=drawn, **DOUBLE)) for role, shape in SHAPES.items()}


def test_each_head_is_the_best_train_of_its_own_rows_or_columns():
    """Of two modes the best is known: the truncated SVD of the unfolding of each head."""
    given, fitted = layers(), PerHeadTt(rank=3, modes=2).fit(layers(), {}, HEADS)
    for role, op in fitted.items():
        number, axis = (2 if role in "kv" else 4), 1 if role == "o" else 0
        pairs = zip(given[role].weight.chunk(number, axis), op.to_dense().detach().chunk(number, axis), strict=True)
        for (head, made), part in zip(pairs, op.parts, strict=True):
            (p, q), (i, j) = part.out_modes, part.in_modes
            unfolded = head.reshape(p, q, i, j).transpose(1, 2).reshape(p * i, q * j)
            best = torch.linalg.svdvals(unfolded)[3:].norm()
            torch.testing.assert_close((head - made).norm(), best, rtol=1e-9, atol=0)


def test_the_published_heads_have_feasible_bonds():
    shapes = dict.fromkeys(("q", "k", "v", "o"), (4096, 4096))
    ops = PerHeadTt(rank=64).empty(shapes, Heads(32, 32, 128))
    assert {op.num_params for op in ops.values()} == {32 * 99_584}
    assert ops["q"].axis == "out" and ops["o"].axis == "in"


def test_grouped_keys_and_what_is_refused():
    ops = PerHeadTt(keep=0.5, modes=2).empty(SHAPES, HEADS)
    assert (len(ops["q"].parts), len(ops["k"].parts), len(ops["o"].parts)) == (4, 2, 4)
    assert all(op.num_params <= 0.5 * SHAPES[role][0] * SHAPES[role][1] for role, op in ops.items())
    with pytest.raises(RoleError, match=r"q: per_head_tt: rank 90 .* largest usable rank is 6"):
        PerHeadTt(rank=90, modes=2).empty(SHAPES, HEADS)
    with pytest.raises(RoleError, match=r"keep=0.01 leaves no rank for a 24x8 layer; the smallest usable keep is 0\."):
        PerHeadTt(keep=0.01, modes=2).empty(SHAPES, HEADS)
    with pytest.raises(ValueError, match="either keep"):
        PerHeadTt()
