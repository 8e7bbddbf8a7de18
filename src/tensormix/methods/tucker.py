"""What the methods share that put several matrices into one Tucker tensor.

Shape letters: O out_features, I in_features, D hidden size, H heads, C channels of a head, P parts of a group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.hooi import Tucker, full_hosvd, held_by, hooi
from tensormix.methods.base import Heads, JointMethod, Layer, Statistics, Symmetry
from tensormix.methods.neurons import unchanged, with_bias
from tensormix.operators import Dense, StructuredLinear, TuckerHeads
from tensormix.operators.tucker_heads import Part, checked_ranks, groups_of, num_params

Shapes = Mapping[str, tuple[int, int]]  # role -> (O, I)


class SharedTucker(JointMethod):
    """Several matrices of one hidden size as parts of one tensor (hidden size, heads, channels, part), by HOOI.

    With `keep` the ranks are those that hold most of the tensor within the budget, of all that the cut HOSVD offers.

    Raises ValueError unless exactly one of `keep` and `ranks` is given.
    """

    size = "keep"

    keep: float | None = Field(
        default=None, gt=0, le=1
    )  # fraction of the dense numbers; 1 leaves the layers as they are
    ranks: tuple[int, int, int] | None = Field(default=None, strict=False)  # of the hidden size, channels, parts
    steps: int = Field(default=10, ge=0)  # of HOOI, at most
    tolerance: float = Field(default=1e-4, ge=0, allow_inf_nan=False)  # stops where a step gains less of the energy

    @model_validator(mode="after")
    def _one_of_both(self) -> SharedTucker:
        if (self.keep is None) == (self.ranks is None):
            raise ValueError(f"{self.name} needs either keep (a fraction) or ranks (of hidden size, channels, parts)")
        return self

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        return ()  # every matrix stays in its own bases

    @abstractmethod
    def layout(self, shapes: Shapes, heads: Heads | None) -> tuple[dict[str, Part], int, int]:
        """The parts by role, the hidden size and the channels of a head. Raises ValueError if they do not fit."""

    def empty(self, shapes: Shapes, heads: Heads | None) -> dict[str, StructuredLinear]:
        """With `keep` the ranks depend on the weights: these are those of a tensor whose energy lies evenly."""
        parts, D, C = self.layout(shapes, heads)
        with torch.device("meta"):
            if self.keep == 1:
                return {role: Dense(I, O) for role, (O, I) in shapes.items()}
            even = torch.ones(D, C, device="cpu").cumsum(0).cumsum(1)
            ranks = self._ranks(parts, D, C, [even * q for q in _numbers(parts)])
            return self._views(self.operator(parts, D, C, ranks))

    def fit(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], heads: Heads | None
    ) -> dict[str, StructuredLinear]:
        shapes = {role: (layer.weight.shape[0], layer.weight.shape[1]) for role, layer in layers.items()}
        parts, D, C = self.layout(shapes, heads)
        if self.keep == 1:
            return unchanged(layers)
        cut = {name: _head_tensor(layers[name].weight, part, C) for name, part in parts.items()}
        whole = full_hosvd([torch.stack([cut[name] for name in names], dim=-1) for names in groups_of(parts)])
        ranks = self._ranks(parts, D, C, [held_by(whole, q) for q in _numbers(parts)])
        owner = self.operator(parts, D, C, ranks).to(next(iter(layers.values())).weight)
        fill(owner, hooi(whole, ranks, self.steps, self.tolerance))
        return {role: with_bias(view, layers[role].bias) for role, view in self._views(owner).items()}

    def count(self, parts: dict[str, Part], D: int, C: int, ranks: tuple[int, int, int]) -> int:
        """The numbers that are stored at these ranks."""
        return num_params(parts, D, C, ranks)

    def operator(self, parts: dict[str, Part], D: int, C: int, ranks: tuple[int, int, int]) -> TuckerHeads:
        """An empty one."""
        return TuckerHeads(hidden_size=D, head_dim=C, parts=named(parts), ranks=ranks)

    def _ranks(self, parts: dict[str, Part], D: int, C: int, held: list[Tensor]) -> tuple[int, int, int]:
        """`ranks`, or of all that fit into the budget the ones that hold most: `held` (D, C) for 1, 2, ... parts."""
        dense = sum(D * C * part.num_heads for part in parts.values())
        if self.ranks is not None:
            checked_ranks(self.ranks, D, C, len(held))
            if self.count(parts, D, C, self.ranks) > dense:
                raise ValueError(self._expands(parts, D, C, dense))
            return self.ranks
        assert self.keep is not None
        room = int(self.keep * dense + 1e-6)
        best, most = None, -1.0
        for q, table in enumerate(held, start=1):
            for s in range(1, C + 1):
                r = self._largest(parts, D, C, s, q, room)
                if r >= 1 and float(table[r - 1, s - 1]) > most:
                    best, most = (r, s, q), float(table[r - 1, s - 1])
        if best is None:
            least = ceil(self.count(parts, D, C, (1, 1, 1)) / dense * 1e6) / 1e6
            raise ValueError(f"{self.name}: keep={self.keep} leaves no rank; the smallest usable keep is {least}")
        return best

    def _expands(self, parts: dict[str, Part], D: int, C: int, dense: int) -> str:
        assert self.ranks is not None
        _, S, Q = self.ranks
        largest = self._largest(parts, D, C, S, Q, dense)
        count = self.count(parts, D, C, self.ranks)
        nearest = f"the largest rank of the hidden size at the same others is {largest}"
        nearest = nearest if largest else "take smaller ones for the channels and parts too"
        return (
            f"{self.name}: ranks={list(self.ranks)} would hold {count:,} numbers, more than the {dense:,} there; "
            f"{nearest}"
        )

    def _largest(self, parts: dict[str, Part], D: int, C: int, s: int, q: int, room: int) -> int:
        """The largest rank of the hidden size within `room` numbers: they grow with it by equal steps."""
        at_zero, at_one = (self.count(parts, D, C, (r, s, q)) for r in (0, 1))
        return max(0, min(D, (room - at_zero) // (at_one - at_zero)))

    def _views(self, owner: TuckerHeads) -> dict[str, Any]:
        return dict(owner.views(self.name))


def named(parts: Mapping[str, Part]) -> list[tuple[str, int, bool]]:
    return [(name, part.num_heads, part.reads) for name, part in parts.items()]


def _numbers(parts: dict[str, Part]) -> range:
    """All ranks of the parts."""
    return range(1, max(map(len, groups_of(parts))) + 1)


def _head_tensor(weight: Tensor, part: Part, C: int) -> Tensor:  # (O, I) -> (D, H, C)
    return (weight.T if part.reads else weight).unflatten(1, (part.num_heads, C))


@torch.no_grad()
def fill(owner: TuckerHeads, tucker: Tucker) -> None:
    """Give an operator these factors and cores."""
    owner.hidden.copy_(tucker.hidden.T)
    owner.channels.copy_(tucker.channels)
    for number, (part, core) in enumerate(zip(tucker.parts, tucker.cores, strict=True)):
        owner.get_parameter(f"part_{number}").copy_(part)
        owner.fill_core(number, core.permute(3, 1, 2, 0).flatten(1))  # (Q, H, S, R)
