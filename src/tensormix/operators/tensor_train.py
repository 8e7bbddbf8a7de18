"""A tensor train over paired factors of the outputs and inputs (Oseledets 2011).

Shape letters (this file): K modes; of mode k: o, i the factors of O and I, a, b the bonds on its left and right.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear


class TensorTrain(StructuredLinear):
    """W[(o_1 ... o_K), (i_1 ... i_K)] = C_1[o_1, i_1] C_2[o_2, i_2] ... C_K[o_K, i_K], each C_k[o, i] an a x b matrix.

    One token goes through the cores in the order that holds the fewest numbers at a time, and of those the one with the
    fewest multiplications: it begins at some core and goes on to either side. From `dense_from` tokens on it takes
    fewer multiplications to write W out and multiply by it, and then that is done; None if that never pays.
    `macs_per_token` is that of the cores: exact for fewer tokens, and more than is spent from there on.

    Args:
        out_modes: K factors of out_features.
        in_modes: K factors of in_features.
        ranks: the K - 1 bonds between.

    Raises:
        ValueError: the factors do not multiply to the sizes, or a bond is outside what its neighbours allow.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        ranks: Sequence[int],
    ) -> None:
        super().__init__(in_features, out_features)
        _check(in_features, out_features, out_modes, in_modes, ranks)
        self.out_modes, self.in_modes, self.ranks = list(out_modes), list(in_modes), list(ranks)
        bonds = (1, *ranks, 1)
        for k, (o, i) in enumerate(zip(out_modes, in_modes, strict=True)):
            self.register_parameter(f"core_{k}", nn.Parameter(torch.empty(o * bonds[k + 1], bonds[k] * i)))
        self.order, self.macs = contraction_order(tuple(out_modes), tuple(in_modes), bonds)
        saved = self.macs - in_features * out_features
        writing = _writing_macs(self.out_modes, self.in_modes, bonds)
        self.dense_from = max(2, writing // saved + 1) if saved > 0 else None

    @classmethod
    def from_dense(
        cls, weight: Tensor, *, out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]
    ) -> TensorTrain:  # (O, I)
        """By TT-SVD in fp64: the squared error is at most the sum of the squared singular values that are cut off, and
        at most K - 1 times that of the best train of these bonds."""
        _check(weight.shape[1], weight.shape[0], out_modes, in_modes, ranks)
        cores, _ = tt_svd(weight.detach().double(), out_modes, in_modes, ranks)
        return cls.from_cores(weight, cores)

    @classmethod
    def from_cores(cls, like: Tensor, cores: Sequence[Tensor]) -> TensorTrain:  # (a, o, i, b) each
        """The operator with these cores, in the dtype and on the device of `like`."""
        out_modes, in_modes = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
        ranks = [core.shape[3] for core in cores[:-1]]
        op = cls(prod(in_modes), prod(out_modes), out_modes=out_modes, in_modes=in_modes, ranks=ranks).to(like)
        with torch.no_grad():
            for k, core in enumerate(cores):
                op.get_parameter(f"core_{k}").copy_(core.permute(1, 3, 0, 2).flatten(2).flatten(0, 1))
        return op

    def _core(self, k: int) -> Tensor:  # (o, b, a, i)
        o, i, bonds = self.out_modes[k], self.in_modes[k], (1, *self.ranks, 1)
        return self.get_parameter(f"core_{k}").view(o, bonds[k + 1], bonds[k], i)

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        tokens = x.shape[:-1].numel()
        if self.dense_from is not None and tokens >= self.dense_from:
            return F.linear(x, self._written_out())
        first, sides = self.order
        left, right = first, first + 1  # the cores from `left` to before `right` are done
        before, after = prod(self.in_modes[:left]), prod(self.in_modes[right:])
        core = self._core(first).permute(2, 0, 1, 3)  # (a, o, b, i)
        state = x.reshape(tokens, before, self.in_modes[first], after).transpose(2, 3)
        state = F.linear(state, core.flatten(0, 2)).unflatten(-1, core.shape[:3])  # (N, before, after, a, o, b)
        state = state.permute(0, 1, 3, 4, 5, 2)  # (N, before, a, out, b, after), as after every step
        for to_right in sides:
            state = self._to_right(state, right) if to_right else self._to_left(state, left - 1)
            left, right = (left, right + 1) if to_right else (left - 1, right)
        return state.reshape(*x.shape[:-1], self.out_features)

    def _to_right(self, state: Tensor, k: int) -> Tensor:
        o, b, _, i = (core := self._core(k)).shape
        rest = prod(self.in_modes[k + 1 :])
        state = state.unflatten(-1, (i, rest)).permute(0, 1, 2, 3, 6, 4, 5).flatten(-2)
        state = F.linear(state, core.flatten(2).flatten(0, 1)).unflatten(-1, (o, b))
        return state.permute(0, 1, 2, 3, 5, 6, 4).flatten(3, 4)

    def _to_left(self, state: Tensor, k: int) -> Tensor:
        o, b, a, i = (core := self._core(k)).shape
        rest = prod(self.in_modes[:k])
        state = state.unflatten(1, (rest, i)).permute(0, 1, 4, 5, 6, 2, 3).flatten(-2)
        state = F.linear(state, core.permute(2, 0, 3, 1).reshape(a * o, i * b)).unflatten(-1, (a, o))
        return state.permute(0, 1, 5, 6, 2, 3, 4).flatten(3, 4)

    def _written_out(self) -> Tensor:  # (O, I)
        """W from the left core on, by products; `to_dense` comes from the right, by sums."""
        written = self._core(0).new_ones(1, 1)  # ((o i) of all modes so far, b)
        for k in range(len(self.ranks) + 1):
            core = self._core(k)
            _, b, a, _ = core.shape
            written = F.linear(written, core.permute(0, 3, 1, 2).reshape(-1, a)).reshape(-1, b)
        pairs = [n for pair in zip(self.out_modes, self.in_modes, strict=True) for n in pair]
        places = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
        return written.view(pairs).permute(places).reshape(self.out_features, self.in_features)

    def to_dense(self) -> Tensor:  # (O, I)
        dense = self._core(0).new_ones(1, 1, 1)
        for k in reversed(range(len(self.ranks) + 1)):
            core = self._core(k)
            dense = torch.einsum("obai,bpq->aopiq", core, dense).flatten(3, 4).flatten(1, 2)
        return dense[0]

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {**ends, "out_modes": self.out_modes, "in_modes": self.in_modes, "ranks": self.ranks}

    @property
    def macs_per_token(self) -> int:
        return self.macs


def tt_svd(
    weight: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]
) -> tuple[list[Tensor], float]:  # (O, I) -> (a, o, i, b) each
    """A truncated SVD at each bond, from the left; and the sum of the squared singular values that were cut off.

    The squared error is at most that sum (it is no larger than the one of each bond's unfolding of the weight). All
    cores get the same share of the norm.
    """
    K = len(out_modes)
    pairs = [axis for k in range(K) for axis in (k, K + k)]
    rest = weight.reshape(*out_modes, *in_modes).permute(pairs).reshape(1, -1)
    cores, cut, a = [], 0.0, 1
    for k, b in enumerate(ranks):
        o, i = out_modes[k], in_modes[k]
        rest = rest.reshape(a * o * i, -1)
        # The right singular vectors are as large as the weight and of no use: u^T times what is left is the same.
        square = torch.linalg.qr(rest.T, mode="r").R.T if rest.shape[1] > rest.shape[0] else rest
        u, s, _ = torch.linalg.svd(square, full_matrices=False)
        cores.append(u[:, :b].reshape(a, o, i, b))
        cut += float(s[b:].square().sum())
        rest, a = u[:, :b].T @ rest, b
    cores.append(rest.reshape(a, out_modes[-1], in_modes[-1], 1))
    norm = torch.linalg.vector_norm(cores[-1])
    share = torch.where(norm > 0, norm, 1) ** (1 / K)
    return [core * share for core in cores[:-1]] + [cores[-1] * share / torch.where(norm > 0, norm, 1)], cut


def mode_factors(width: int, count: int) -> list[int]:
    """`count` factors of any width: its primes, the largest first, each into the smallest factor so far; ascending."""
    primes, rest, divisor = [], width, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    factors = [1] * count
    for prime in sorted([*primes, rest], reverse=True):
        factors[factors.index(min(factors))] *= prime
    return sorted(factors)


def largest_ranks(out_modes: Sequence[int], in_modes: Sequence[int]) -> list[int]:
    """The bonds of an exact train: what lies on the smaller side of each."""
    sizes = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]


def num_params(out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> int:
    """How many numbers the cores hold."""
    bonds = (1, *ranks, 1)
    return sum(bonds[k] * o * i * bonds[k + 1] for k, (o, i) in enumerate(zip(out_modes, in_modes, strict=True)))


@lru_cache(maxsize=256)
def contraction_order(
    out_modes: tuple[int, ...], in_modes: tuple[int, ...], bonds: tuple[int, ...]
) -> tuple[tuple[int, tuple[bool, ...]], int]:
    """The core to begin at, and for each further one whether it lies on the right; and the multiplications of a token.

    Of all orders in which the finished cores stay together, those whose largest state is the smallest, and of them one
    with the fewest multiplications.
    """
    K = len(out_modes)

    def held(left: int, right: int) -> int:  # numbers of a token when the cores from `left` to before `right` are done
        ends = prod(in_modes[:left]) * bonds[left] * bonds[right] * prod(in_modes[right:])
        return ends * prod(out_modes[left:right])

    spans = [(left, left + length) for length in range(1, K + 1) for left in range(K - length + 1)]
    most: dict[tuple[int, int], int] = {}
    for left, right in spans:
        reached = min((most[span] for span in ((left, right - 1), (left + 1, right)) if span in most), default=0)
        most[left, right] = max(held(left, right), reached)
    limit = most[0, K]
    best: dict[tuple[int, int], tuple[int, tuple[int, tuple[bool, ...]]]] = {}
    for left, right in spans:
        if held(left, right) > limit:
            continue
        done = held(left, right)  # each number of the new state is a sum over a factor of the inputs and a bond
        if right - left == 1:
            best[left, right] = done * in_modes[left], (left, ())
            continue
        ways = []
        if (left, right - 1) in best:
            macs, (first, sides) = best[left, right - 1]
            ways.append((macs + done * bonds[right - 1] * in_modes[right - 1], (first, (*sides, True))))
        if (left + 1, right) in best:
            macs, (first, sides) = best[left + 1, right]
            ways.append((macs + done * bonds[left + 1] * in_modes[left], (first, (*sides, False))))
        if ways:
            best[left, right] = min(ways)
    macs, order = best[0, K]
    return order, macs


def _writing_macs(out_modes: Sequence[int], in_modes: Sequence[int], bonds: Sequence[int]) -> int:
    sizes = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return sum(prod(sizes[: k + 1]) * bonds[k] * bonds[k + 1] for k in range(len(sizes)))


def _check(
    in_features: int, out_features: int, out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]
) -> None:
    check_modes(in_features, out_features, out_modes, in_modes)
    if len(ranks) != len(out_modes) - 1:
        raise ValueError(f"TensorTrain: {len(out_modes)} modes have {len(out_modes) - 1} bonds, got {len(ranks)} ranks")
    bonds, sizes = [1, *ranks], [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    for k, rank in enumerate(ranks):
        largest = min(bonds[k] * sizes[k], prod(sizes[k + 1 :]))
        if not 1 <= rank <= largest:
            raise ValueError(
                f"TensorTrain: rank {k + 1} of {list(ranks)} must be in 1..{largest} for out_modes {list(out_modes)} "
                f"and in_modes {list(in_modes)}, got {rank}"
            )


def check_modes(in_features: int, out_features: int, out_modes: Sequence[int], in_modes: Sequence[int]) -> None:
    """Raise ValueError unless both are as many factors of their sizes; the sentence names some that are."""
    for name, width, modes in (("out_modes", out_features, out_modes), ("in_modes", in_features, in_modes)):
        if not modes or min(modes) < 1 or prod(modes) != width:
            count = max(len(out_modes), len(in_modes), 1)
            raise ValueError(
                f"TensorTrain: {name} {list(modes)} must multiply to {width} for a {in_features}x{out_features} layer, "
                f"as {mode_factors(width, count)} do"
            )
    if len(out_modes) != len(in_modes):
        count = max(len(out_modes), len(in_modes))
        raise ValueError(
            f"TensorTrain: out_modes and in_modes are pairs, but there are {len(out_modes)} and {len(in_modes)}; "
            f"{mode_factors(out_features, count)} and {mode_factors(in_features, count)} are as many"
        )
