"""How many numbers a tensor train holds when one rank caps all its bonds."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, floor, prod
from typing import NamedTuple

from tensormix.operators.tensor_train import largest_ranks, num_params


class Modes(NamedTuple):
    """The factors of the outputs and of the inputs, pair by pair."""

    out_modes: list[int]
    in_modes: list[int]

    @property
    def dense(self) -> int:
        """Numbers of the dense weight."""
        return prod(self.out_modes) * prod(self.in_modes)

    @property
    def layer(self) -> str:
        return f"a {prod(self.in_modes)}x{prod(self.out_modes)} layer"


def capped(modes: Modes, rank: int) -> list[int]:
    """The bonds: `rank`, or what lies on the smaller side of a bond where that is less."""
    return [min(rank, most) for most in largest_ranks(*modes)]


def largest_rank(modes: Modes, room: int) -> int:
    """The largest rank whose cores hold at most `room` numbers, or 0: they grow with it."""
    low, high = 0, max(largest_ranks(*modes), default=1)
    while low < high:
        rank = (low + high + 1) // 2
        fits = num_params(*modes, capped(modes, rank)) <= room
        low, high = (rank, high) if fits else (low, rank - 1)
    return low


def train_ranks(method: str, modes: Modes, keep: float | None, rank: int | None, beside: int = 0) -> list[int]:
    """The bonds at `rank`, or at the largest that `keep` of the dense numbers allow when `beside` of them go elsewhere.

    Raises:
        ValueError: no rank fits into `keep`, or `rank` is more than possible or would hold more numbers than the dense
            weight; the sentence begins with `method`.
    """
    room = modes.dense if keep is None else floor(keep * modes.dense + 1e-9)  # the margin undoes its rounding
    largest = largest_rank(modes, room - beside)
    if largest == 0:
        raise ValueError(f"{method}: {_no_rank(modes, keep, beside)}")
    if rank is not None and rank > largest:
        possible = max(largest_ranks(*modes), default=1)
        reason = "it would hold more numbers than the dense weight"
        reason = reason if rank <= possible else f"no bond can have more than {possible}"
        raise ValueError(
            f"{method}: rank {rank} is too large for {modes.layer} with out_modes {modes.out_modes} and in_modes "
            f"{modes.in_modes}: {reason}; the largest usable rank is {largest}."
        )
    return capped(modes, largest if rank is None else rank)


def _no_rank(modes: Modes, keep: float | None, beside: int) -> str:
    least = num_params(*modes, [1] * (len(modes.out_modes) - 1)) + beside
    if least > modes.dense:
        return f"rank 1 of {modes.layer} stores {least} numbers, the dense weight {modes.dense}; leave it dense."
    smallest = ceil(least / modes.dense * 1e6) / 1e6
    return f"keep={keep} leaves no rank for {modes.layer}; the smallest usable keep is {smallest:g}."


def train_keeps(modes: Modes, beside: int = 0) -> Iterator[float]:
    """The least `keep`, to six digits, of every rank that is the largest within some 64th of the dense numbers."""
    last = 0
    for step in range(1, 65):
        rank = largest_rank(modes, modes.dense * step // 64 - beside)
        if rank > last:
            last = rank
            yield min(1.0, ceil((num_params(*modes, capped(modes, rank)) + beside) / modes.dense * 1e6) / 1e6)
