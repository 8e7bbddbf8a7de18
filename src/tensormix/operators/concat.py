"""Several operators, each for its own part of the outputs or of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tensormix.operators.base import StructuredLinear, did_you_mean


class Concat(StructuredLinear):
    """W = [W_1; W_2; ...] along the outputs (axis "out"), or [W_1, W_2, ...] along the inputs (axis "in").

    Args:
        parts: one operator each; they agree on the other axis.
        groups: along the outputs, the rows of every part are cut into this many, and the first pieces of all parts
            come first, then the second ones: how some architectures interleave queries, keys and values head by head.

    Raises:
        ValueError: there are no parts, they do not agree, or the axis or groups do not fit them.
    """

    def __init__(
        self, *, parts: Sequence[StructuredLinear], axis: Literal["out", "in"] = "out", groups: int = 1
    ) -> None:
        if axis not in ("out", "in"):
            raise ValueError(f"Concat: axis must be 'out' or 'in', got {axis!r}{did_you_mean(axis, ('out', 'in'))}")
        ends = [(part.in_features, part.out_features) for part in parts]
        shared = {end[0 if axis == "out" else 1] for end in ends}
        if len(shared) != 1:
            found = ", ".join(f"{i}x{o}" for i, o in ends) or "no parts"
            raise ValueError(f"Concat: needs parts that agree on the axis that is not {axis!r}, got {found}")
        total, other = sum(end[1 if axis == "out" else 0] for end in ends), shared.pop()
        super().__init__(*((other, total) if axis == "out" else (total, other)))
        if groups < 1 or (groups > 1 and axis == "in") or any(end[1] % groups for end in ends):
            sizes = ", ".join(str(end[1]) for end in ends)
            raise ValueError(f"Concat: groups={groups} must divide the rows of every part ({sizes}) of axis 'out'")
        self.axis, self.groups = axis, groups
        self.parts = nn.ModuleList(parts)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,  # (O, I)
        *,
        parts: Sequence[tuple[int, type[StructuredLinear], dict[str, Any]]],
        axis: Literal["out", "in"] = "out",
        groups: int = 1,
    ) -> Concat:
        """Each (size along the axis, operator class, its sizes) fits its own part of `weight`."""
        counts = [count for count, _, _ in parts]
        if axis == "out":
            pieces = weight.detach().unflatten(0, (groups, -1)).split([count // groups for count in counts], dim=1)
            pieces = [piece.flatten(0, 1) for piece in pieces]
        else:
            pieces = weight.detach().split(counts, dim=1)
        made = [kind.from_dense(piece, **sizes) for piece, (_, kind, sizes) in zip(pieces, parts, strict=True)]
        return cls(parts=made, axis=axis, groups=groups).to(weight)

    def _parts(self) -> list[StructuredLinear]:
        return [cast(StructuredLinear, part) for part in self.parts]

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        parts = self._parts()
        if self.axis == "out":
            outputs = [part(x).unflatten(-1, (self.groups, part.out_features // self.groups)) for part in parts]
            return torch.cat(outputs, dim=-1).flatten(-2)
        pieces = x.split([part.in_features for part in parts], dim=-1)
        y = parts[0](pieces[0])
        for part, piece in zip(parts[1:], pieces[1:], strict=True):
            y = y + part(piece)
        return y

    def to_dense(self) -> Tensor:  # (O, I)
        matrices = [part.to_dense() for part in self._parts()]
        if self.axis == "in":
            return torch.cat(matrices, dim=1)
        pieces = [matrix.chunk(self.groups) for matrix in matrices]
        return torch.cat([piece for group in zip(*pieces, strict=True) for piece in group])

    @property
    def sizes(self) -> dict[str, Any]:
        return {"parts": [part.spec for part in self._parts()], "axis": self.axis, "groups": self.groups}

    @property
    def macs_per_token(self) -> int:
        return sum(part.macs_per_token for part in self._parts())
