"""Two thin factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype


class LowRank(StructuredLinear):
    """W = left @ right, of rank at most R.

    Raises:
        ValueError: `rank` is outside 1..min(I, O).
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int) -> None:
        super().__init__(in_features, out_features)
        limit = min(in_features, out_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"LowRank: rank must be in 1..{limit} for a {in_features}x{out_features} layer, got {rank}"
            )
        self.rank = rank
        self.left = nn.Parameter(torch.empty(out_features, rank))
        self.right = nn.Parameter(torch.empty(rank, in_features))

    @classmethod
    def from_dense(cls, weight: Tensor, *, rank: int) -> LowRank:  # (O, I)
        """The nearest matrix of this rank in the Frobenius norm: the truncated SVD (Eckart, Young 1936).

        Each factor gets the square roots of the singular values, so that both have the same norm.
        """
        O, I = weight.shape
        op = cls(I, O, rank=rank).to(weight)
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(weight.to(computing_dtype(weight)), full_matrices=False)
            root = s[:rank].sqrt()
            op.left.copy_(u[:, :rank] * root)
            op.right.copy_(root[:, None] * vh[:rank])
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return F.linear(F.linear(x, self.right), self.left)

    def to_dense(self) -> Tensor:  # (O, I)
        return torch.einsum("or,ri->oi", self.left, self.right)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}

    @property
    def macs_per_token(self) -> int:
        return self.rank * (self.in_features + self.out_features)
