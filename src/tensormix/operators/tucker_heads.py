"""The projections of one attention as one Tucker tensor: all heads share their factors, and each has a core of its own.

Shape letters (this file): D hidden size, H heads of a part, C channels of a head, P parts of one group, and the ranks
  R of the hidden size     S of the channels     Q of the parts of a group
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.shared import Owner


class Part(NamedTuple):
    """One projection. It reads the hidden size and puts out heads (q, k, v), or reads heads and puts it out (o)."""

    num_heads: int
    reads: bool


class TuckerHeads(Owner):
    """W_part[head h] = sum over q of part_g[part, q] channels core_g[q, h] hidden, (C, D); transposed where it writes.

    `hidden` (R, D) and `channels` (C, S) are shared by all heads of all parts. Parts with equally many heads are a
    group g: they share `part_g` (P, Q) and `core_g` (Q, H S R), which is never multiplied out for all parts at once.
    With as many heads of keys as of queries that is one group of four, the Tucker-4 form of TensorLLM.

    Args:
        parts: of each its name, how many heads it has, and whether it reads the hidden size.
        ranks: (R, S, Q); a group has at most as many Q as parts.

    Raises:
        ValueError: a rank is not possible.
    """

    def __init__(
        self, *, hidden_size: int, head_dim: int, parts: Sequence[Sequence[Any]], ranks: Sequence[int]
    ) -> None:
        super().__init__()
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.parts = {name: Part(*part) for name, *part in parts}
        self.groups = groups_of(self.parts)
        R, S, Q = self.ranks = checked_ranks(ranks, hidden_size, head_dim, max(map(len, self.groups)))
        self.hidden = nn.Parameter(torch.empty(R, hidden_size))
        self.channels = nn.Parameter(torch.empty(head_dim, S))
        for number, names in enumerate(self.groups):
            heads, q = self.parts[names[0]].num_heads, min(Q, len(names))
            self.register_parameter(f"part_{number}", nn.Parameter(torch.empty(len(names), q)))
            self._add_core(number, q, heads * S * R)

    def _add_core(self, number: int, rows: int, columns: int) -> None:
        self.register_parameter(f"core_{number}", nn.Parameter(torch.empty(rows, columns)))

    def whole_core(self, number: int) -> Tensor:  # (Q, H S R)
        """Of one group."""
        return self.get_parameter(f"core_{number}")

    def fill_core(self, number: int, core: Tensor) -> None:  # (Q, H S R)
        self.get_parameter(f"core_{number}").copy_(core)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        wide = {name: part.num_heads * self.head_dim for name, part in self.parts.items()}
        return {
            name: (wide[name], self.hidden_size) if part.reads else (self.hidden_size, wide[name])
            for name, part in self.parts.items()
        }

    @property
    def sizes(self) -> dict[str, Any]:
        parts = [[name, *part] for name, part in self.parts.items()]
        ends = {"hidden_size": self.hidden_size, "head_dim": self.head_dim}
        return {**ends, "parts": parts, "ranks": list(self.ranks)}

    def _mixed(self, part: str) -> tuple[Tensor, Tensor]:
        """The weights of one part, and the cores that it mixes."""
        number = next(n for n, names in enumerate(self.groups) if part in names)
        weights = self.get_parameter(f"part_{number}")[self.groups[number].index(part)]
        return weights, self.whole_core(number)

    def _core(self, part: str) -> Tensor:  # (H S, R)
        """The core of one part. It is mixed once in each call, for all its tokens."""
        weights, core = self._mixed(part)
        return (weights[:, None] * core).sum(0).view(-1, self.ranks[0])

    def multiply(self, x: Tensor, part: str) -> Tensor:  # (..., I) -> (..., O)
        H, reads = self.parts[part]
        if reads:
            heads = F.linear(F.linear(x, self.hidden), self._core(part)).unflatten(-1, (H, self.ranks[1]))
            return F.linear(heads, self.channels).flatten(-2)
        heads = F.linear(x.unflatten(-1, (H, self.head_dim)), self.channels.T).flatten(-2)
        return F.linear(F.linear(heads, self._core(part).T), self.hidden.T)

    def to_dense(self, part: str) -> Tensor:  # (O, I)
        (H, reads), (R, S, _) = self.parts[part], self.ranks
        weights, core = self._mixed(part)
        dense = torch.einsum("q,qhsr,rd,cs->hcd", weights, core.view(-1, H, S, R), self.hidden, self.channels).flatten(
            0, 1
        )
        return dense if reads else dense.T

    def macs_of(self, part: str) -> int:
        (R, S, _), H = self.ranks, self.parts[part].num_heads
        return self.hidden_size * R + H * S * R + H * self.head_dim * S


def groups_of(parts: Mapping[str, Part]) -> list[list[str]]:
    """The parts that have equally many heads."""
    found: dict[int, list[str]] = {}
    for name, part in parts.items():
        found.setdefault(part.num_heads, []).append(name)
    return list(found.values())


def num_params(parts: Mapping[str, Part], hidden_size: int, head_dim: int, ranks: Sequence[int]) -> int:
    """What a `TuckerHeads` of these sizes stores: D R + C S + for each group P Q + Q H S R."""
    R, S, Q = ranks
    groups = [(len(names), parts[names[0]].num_heads) for names in groups_of(parts)]
    return hidden_size * R + head_dim * S + sum(P * min(P, Q) + min(P, Q) * H * S * R for P, H in groups)


def checked_ranks(ranks: Sequence[int], hidden_size: int, head_dim: int, num_parts: int) -> tuple[int, int, int]:
    largest = hidden_size, head_dim, num_parts
    names = "the hidden size", "the channels of a head", "the parts"
    for rank, limit, name in zip(ranks, largest, names, strict=True):
        if not 1 <= rank <= limit:
            raise ValueError(f"TuckerHeads: the rank of {name} must be in 1..{limit}, got {rank}")
    return ranks[0], ranks[1], ranks[2]
