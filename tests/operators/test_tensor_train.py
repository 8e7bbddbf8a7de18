"""Tensor trains: TT-SVD within its bound, exact at full rank, the published counts, and the order of contraction."""

from __future__ import annotations

from itertools import permutations
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tensormix.operators import TensorTrain
from tensormix.operators.tensor_train import contraction_order, largest_ranks, mode_factors, num_params, tt_svd

DOUBLE = {"dtype": torch.float64}
MODES = {"out_modes": [2, 1, 5, 4], "in_modes": [2, 3, 2, 4]}  # 40 x 48


def capped(cap, modes=MODES):
    return [min(cap, most) for most in largest_ranks(modes["out_modes"], modes["in_modes"])]


def weight(seed=0):
    return torch.randn(40, 48, generator=torch.Generator().manual_seed(seed), **DOUBLE)


@pytest.mark.parametrize("cap", [1, 3, 7, 15])
def test_the_error_is_within_what_was_cut_off_and_that_within_the_tails_of_the_unfoldings(cap):
    dense, ranks = weight(), capped(cap)
    cores, cut = tt_svd(dense, **MODES, ranks=ranks)
    error = float((TensorTrain.from_cores(dense, cores).to_dense().detach() - dense).square().sum())
    assert error <= cut * (1 + 1e-10)
    tensor = dense.reshape(*MODES["out_modes"], *MODES["in_modes"]).permute(0, 4, 1, 5, 2, 6, 3, 7)
    tails = 0.0
    for k, rank in enumerate(ranks, start=1):
        tails += float(torch.linalg.svdvals(tensor.flatten(2 * k).flatten(0, 2 * k - 1))[rank:].square().sum())
    assert cut <= tails * (1 + 1e-10)
    assert cut > 0


def test_of_two_modes_it_is_the_best_there_is():
    """One bond: the truncated SVD of the only unfolding (Eckart and Young)."""
    dense = weight()
    op = TensorTrain.from_dense(dense, out_modes=[8, 5], in_modes=[6, 8], ranks=[9])
    unfolded = dense.reshape(8, 5, 6, 8).permute(0, 2, 1, 3).reshape(48, 40)
    best = torch.linalg.svdvals(unfolded)[9:].norm()
    torch.testing.assert_close((op.to_dense() - dense).norm().detach(), best, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("O", "I"), [(576, 192), (30, 7), (86, 64), (13, 11)])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_full_bonds_are_exact_at_any_width(O, I, count):
    dense = torch.randn(O, I, **DOUBLE)
    modes = {"out_modes": mode_factors(O, count), "in_modes": mode_factors(I, count)}
    op = TensorTrain.from_dense(dense, **modes, ranks=largest_ranks(**modes))
    torch.testing.assert_close(op.to_dense().detach(), dense, rtol=0, atol=1e-12)
    x = torch.randn(3, I, **DOUBLE)
    torch.testing.assert_close(op(x).detach(), x @ dense.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("width", "factors"),
    [
        (4096, [2] * 12),
        (11008, [1, 1, 1, *[2] * 8, 43]),
        (16384, [*[2] * 10, 4, 4]),
        (576, [*[1] * 4, *[2] * 6, 3, 3]),
        (1536, [1, 1, *[2] * 9, 3]),
        (7, [*[1] * 11, 7]),
    ],
)
def test_factors_are_the_published_ones_and_multiply_to_any_width(width, factors):
    assert mode_factors(width, 12) == factors and prod(factors) == width


def test_the_published_counts_come_out():
    """TT-LLM: 113,108 numbers of a 4096 x 11008 layer at 64; its CR 1.98 per head counts bonds that cannot be."""
    out, into = mode_factors(11008, 12), mode_factors(4096, 12)
    assert num_params(out, into, [min(64, most) for most in largest_ranks(out, into)]) == 113_108
    assert round(4096 * 11008 / 113_108, 2) == 398.63
    head, stream = mode_factors(128, 4), mode_factors(4096, 4)
    assert num_params(head, stream, [64] * 3) == 265_216
    assert num_params(head, stream, [min(64, most) for most in largest_ranks(head, stream)]) == 99_584


def all_orders(out_modes, in_modes, bonds):
    """Every order in which the finished cores stay together: its largest state and its multiplications."""
    K = len(out_modes)
    for order in permutations(range(K)):
        done, macs, most = set(), 0, 0
        for k in order:
            if done and k - 1 not in done and k + 1 not in done:
                break
            done.add(k)
            left, right = min(done), max(done) + 1
            state = prod(in_modes[:left]) * bonds[left] * prod(out_modes[left:right])
            state *= bonds[right] * prod(in_modes[right:])
            joined = (bonds[k] if k - 1 in done else 1) * (bonds[k + 1] if k + 1 in done else 1)
            macs, most = macs + state * in_modes[k] * joined, max(most, state)
        else:
            yield most, macs


@pytest.mark.parametrize("seed", range(8))
def test_no_order_holds_less_and_of_those_none_multiplies_less(seed):
    drawn = torch.Generator().manual_seed(seed)
    out_modes, in_modes = (tuple(torch.randint(1, 5, (5,), generator=drawn).tolist()) for _ in range(2))
    bonds = (1, *torch.randint(1, 6, (4,), generator=drawn).tolist(), 1)
    assert contraction_order(out_modes, in_modes, bonds)[1] == min(all_orders(out_modes, in_modes, bonds))[1]


def test_it_begins_in_the_middle_where_that_holds_less():
    modes = {"out_modes": [16, 1, 16], "in_modes": [1, 16, 1]}
    op = TensorTrain.from_dense(torch.randn(256, 16, **DOUBLE), **modes, ranks=[8, 8])
    assert op.order[0] == 1
    x = torch.randn(2, 3, 16, **DOUBLE)
    torch.testing.assert_close(op(x), x @ op.to_dense().T)


def test_many_tokens_go_through_the_written_out_matrix_and_cost_less():
    op = TensorTrain.from_dense(weight(), **MODES, ranks=capped(15))
    assert op.dense_from is not None and op.macs_per_token > 40 * 48
    for tokens in (op.dense_from - 1, op.dense_from, 4 * op.dense_from):
        x = torch.randn(tokens, 48, **DOUBLE)
        with FlopCounterMode(display=False) as counter:
            y = op(x)
        torch.testing.assert_close(y, x @ op.to_dense().T)
        spent, cores = counter.get_total_flops() // 2, tokens * op.macs_per_token
        assert spent == cores if tokens < op.dense_from else spent < cores
    assert TensorTrain(48, 40, **MODES, ranks=[1, 1, 1]).dense_from is None


def test_a_weight_of_zeros_and_one_mode_alone():
    assert not TensorTrain.from_dense(torch.zeros(40, 48), **MODES, ranks=[2, 2, 2]).to_dense().any()
    alone = TensorTrain.from_dense(weight(), out_modes=[40], in_modes=[48], ranks=[])
    torch.testing.assert_close(alone.to_dense().detach(), weight())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"out_modes": [2, 2, 5, 4]}, ("out_modes [2, 2, 5, 4]", "multiply to 40", "[2, 2, 2, 5]")),
        ({"in_modes": [4, 12]}, ("are pairs", "4 and 2")),
        ({"in_modes": [0, 3, 2, 8]}, ("in_modes", "multiply to 48")),
        ({"ranks": [5, 2, 2]}, ("rank 1", "1..4", "got 5")),
        ({"ranks": [4, 12, 17]}, ("rank 3", "1..16", "got 17")),
        ({"ranks": [4, 0, 2]}, ("rank 2", "1..12", "got 0")),
        ({"ranks": [2, 2]}, ("4 modes have 3 bonds", "got 2")),
    ],
)
def test_errors_name_what_would_do(changes, parts):
    with pytest.raises(ValueError) as caught:
        TensorTrain(48, 40, **{**MODES, "ranks": [2, 2, 2], **changes})
    assert all(part in str(caught.value) for part in parts), str(caught.value)
