"""Rows sorted by the expert that they are for.

Shape letters: S rows (tokens at one expert each), E experts, B what experts mix from, I in_features, O out_features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensormix.kernels.grouped import grouped


class Groups(NamedTuple):
    """Whose rows are whose, where the rows of expert 0 come first."""

    experts: Tensor  # (S,), of each row
    ends: Tensor  # (E,), int32: where the rows of each expert end

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:  # (S, I), (E, I, O) -> (S, O)
        """Every row times the matrix of its expert; where autocast is on, in its dtype."""
        kind, dtype = x.device.type, weight.dtype
        if dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return grouped(x.to(dtype), weight.to(dtype), self.ends)

    @property
    def are_few(self) -> bool:
        """Whether it is less work to mix a matrix for each row than one for each expert.

        A graph does not ask: what it does may not depend on how many tokens there are.
        """
        return not (torch.compiler.is_compiling() or self.ends.is_meta) and len(self.experts) <= len(self.ends)

    def mix(self, mixing: Tensor, shared: Tensor) -> Tensor:  # (E, B), (B, n) -> (S or E, n)
        """What experts mix from shared rows: for each row if these are few, else for each expert."""
        return (mixing[self.experts] if self.are_few else mixing) @ shared

    def multiply_mixed(self, x: Tensor, mixed: Tensor) -> Tensor:  # (S, I), (S or E, I, O) -> (S, O)
        """Every row times a matrix made of what `mix` gave."""
        return torch.bmm(x[:, None].to(mixed.dtype), mixed)[:, 0] if self.are_few else self.multiply(x, mixed)
