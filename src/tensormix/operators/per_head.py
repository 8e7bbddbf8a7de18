"""Two thin factors for every head.

Shape letters: H heads, C channels of a head, R rank of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype


class PerHead(StructuredLinear):
    """The rows of W are H equal groups, and group h is left_h @ right_h, of rank at most R.

    Raises:
        ValueError: `num_heads` does not divide the outputs, or `rank` is outside 1..min(I, C).
    """

    def __init__(self, in_features: int, out_features: int, *, num_heads: int, rank: int) -> None:
        super().__init__(in_features, out_features)
        if num_heads < 1 or out_features % num_heads:
            raise ValueError(f"PerHead: num_heads must divide the {out_features} outputs, got {num_heads}")
        limit = min(in_features, out_features // num_heads)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"PerHead: rank must be in 1..{limit} for {num_heads} heads of a {in_features}x{out_features} layer, "
                f"got {rank}"
            )
        self.num_heads, self.rank = num_heads, rank
        self.left = nn.Parameter(torch.empty(out_features, rank))  # (H C, R)
        self.right = nn.Parameter(torch.empty(num_heads * rank, in_features))  # (H R, I)

    @classmethod
    def from_dense(cls, weight: Tensor, *, num_heads: int, rank: int) -> PerHead:  # (O, I)
        """The nearest one in the Frobenius norm: a truncated SVD for each head."""
        heads = weight.detach().to(computing_dtype(weight)).unflatten(0, (num_heads, -1))  # (H, C, I)
        u, s, vh = torch.linalg.svd(heads, full_matrices=False)
        root = s[:, :rank].sqrt()
        return cls.from_factors(weight, u[:, :, :rank] * root[:, None], root[..., None] * vh[:, :rank])

    @classmethod
    def from_factors(cls, like: Tensor, left: Tensor, right: Tensor) -> PerHead:  # (H, C, R), (H, R, I)
        """The operator with these factors, in the dtype and on the device of `like`."""
        (H, C, R), I = left.shape, right.shape[-1]
        op = cls(I, H * C, num_heads=H, rank=R).to(like)
        with torch.no_grad():
            op.left.copy_(left.flatten(0, 1))
            op.right.copy_(right.flatten(0, 1))
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        z = F.linear(x, self.right).unflatten(-1, (self.num_heads, self.rank))
        left = self.left.view(self.num_heads, -1, self.rank)
        return torch.einsum("...hr,hcr->...hc", z, left).flatten(-2)

    def to_dense(self) -> Tensor:  # (O, I)
        pairs = zip(self.left.chunk(self.num_heads), self.right.chunk(self.num_heads), strict=True)
        return torch.cat([left @ right for left, right in pairs])

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {**ends, "num_heads": self.num_heads, "rank": self.rank}

    @property
    def macs_per_token(self) -> int:
        return self.rank * (self.num_heads * self.in_features + self.out_features)
