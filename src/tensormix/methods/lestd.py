"""The heads of an attention in one Tucker tensor with sparse cores.

Shape letters: D hidden size, C channels of a head.
"""

from __future__ import annotations

from bisect import bisect_right
from math import floor
from typing import Literal

from pydantic import Field

from tensormix.methods.base import Heads
from tensormix.methods.tucker import Shapes, SharedTucker, named
from tensormix.methods.tucker_heads import parts_of_heads
from tensormix.operators import SparseTuckerHeads, TuckerHeads
from tensormix.operators.tucker_heads import Part, groups_of, num_params


class LeStd(SharedTucker):
    """The shared factors of `tucker_heads` by HOOI, and of the cores only the entries that hold most.

    The factors are orthonormal, so what is lost when entries of the cores become zero is the sum of their squares: the
    score of an entry is its square, the largest ones are the best of their number, and a refit of those that stay
    changes nothing. Cores of larger ranks fit into a budget than dense ones. `keep` counts factors and entries that
    stay; where these stand comes on top: see `Sparse`.
    """

    source = "LeSTD, ICLR 2026 (OpenReview 0oHaazjMUX); ranks by energy and grouped queries are ours"
    summary = "q, k, v and o of all heads share Tucker factors, and of each core only the largest entries stay."
    roles = ("q", "k", "v", "o")

    name: Literal["lestd"] = "lestd"
    density: float = Field(default=0.5, gt=0, le=1)  # fraction of the entries of the cores that stay

    def layout(self, shapes: Shapes, heads: Heads | None) -> tuple[dict[str, Part], int, int]:
        return parts_of_heads(self.name, shapes, heads)

    def count(self, parts: dict[str, Part], D: int, C: int, ranks: tuple[int, int, int]) -> int:
        dense = sum(self._entries(parts, ranks))
        return num_params(parts, D, C, ranks) - dense + sum(self._num_values(parts, ranks))

    def operator(self, parts: dict[str, Part], D: int, C: int, ranks: tuple[int, int, int]) -> TuckerHeads:
        values = self._num_values(parts, ranks)
        return SparseTuckerHeads(hidden_size=D, head_dim=C, parts=named(parts), ranks=ranks, num_values=values)

    def _num_values(self, parts: dict[str, Part], ranks: tuple[int, int, int]) -> list[int]:
        """That stay of the core of each group."""
        return [max(1, floor(self.density * size + 1e-6)) for size in self._entries(parts, ranks)]

    def _entries(self, parts: dict[str, Part], ranks: tuple[int, int, int]) -> list[int]:
        """Of the core of each group."""
        R, S, Q = ranks
        return [min(Q, len(names)) * parts[names[0]].num_heads * S * R for names in groups_of(parts)]

    def _largest(self, parts: dict[str, Part], D: int, C: int, s: int, q: int, room: int) -> int:
        return bisect_right(range(1, D + 1), room, key=lambda r: self.count(parts, D, C, (r, s, q)))
