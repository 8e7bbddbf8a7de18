"""Two block-diagonal factors with an index shuffle between: Monarch (arXiv 2204.00595), and with rank above 1 the block
tensor train of arXiv 2406.06248.

Shape letters (this file): b blocks, i = I / b, o = O / b, r rank; [x, y] the index x * (size of y) + y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype


class Monarch(StructuredLinear):
    """W[(c, β), (α, d)] = sum_r left[(β, c), (α, r)] right[(α, β, r), d]; α, β are blocks, c < o, d < i.

    For each pair of blocks (α, β) the o x i slice has rank r. It stores b r (I + O) numbers, as many as a low rank of
    b r, with as many MACs; with one block it is one.

    Raises:
        ValueError: `blocks` does not divide both sizes, or the rank of a slice is outside 1..min(i, o).
    """

    def __init__(self, in_features: int, out_features: int, *, blocks: int, rank: int = 1) -> None:
        super().__init__(in_features, out_features)
        if blocks < 1 or in_features % blocks or out_features % blocks:
            raise ValueError(
                f"Monarch: blocks must divide both sizes of a {in_features}x{out_features} layer, got {blocks}"
            )
        limit = min(in_features, out_features) // blocks
        if not 1 <= rank <= limit:
            raise ValueError(
                f"Monarch: rank must be in 1..{limit} for {blocks} blocks of a {in_features}x{out_features} layer, "
                f"got {rank}"
            )
        self.blocks, self.rank = blocks, rank
        self.left = nn.Parameter(torch.empty(out_features, blocks * rank))
        self.right = nn.Parameter(torch.empty(blocks * blocks * rank, in_features // blocks))

    @classmethod
    def from_dense(cls, weight: Tensor, *, blocks: int, rank: int = 1) -> Monarch:  # (O, I)
        """The nearest in the Frobenius norm: a truncated SVD of every slice."""
        O, I = weight.shape
        op = cls(I, O, blocks=blocks, rank=rank).to(weight)
        slices = weight.detach().to(computing_dtype(weight)).reshape(O // blocks, blocks, blocks, I // blocks)
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(
                slices.permute(1, 2, 0, 3), full_matrices=False
            )  # (β, α, o, ·), ..., (β, α, ·, i)
            root = s[..., :rank].sqrt()
            op.left.copy_((u[..., :rank] * root[..., None, :]).permute(0, 2, 1, 3).reshape(op.left.shape))
            op.right.copy_((root[..., None] * vh[..., :rank, :]).transpose(0, 1).reshape(op.right.shape))
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        b, r = self.blocks, self.rank
        rows = x.reshape(-1, b, self.in_features // b)  # (N, α, i)
        right = self.right.view(b, b * r, -1).unbind(0)
        inner = [F.linear(rows[:, block], matrix) for block, matrix in enumerate(right)]  # α times (N, (β, r))
        shuffled = torch.stack(inner, 1).view(len(rows), b, b, r).transpose(1, 2).reshape(len(rows), b, b * r)
        left = self.left.view(b, -1, b * r).unbind(0)
        outer = [F.linear(shuffled[:, block], matrix) for block, matrix in enumerate(left)]  # β times (N, o)
        return torch.stack(outer, -1).reshape(*x.shape[:-1], self.out_features)

    def to_dense(self) -> Tensor:  # (O, I)
        b, r = self.blocks, self.rank
        left, right = self.left.view(b, -1, b, r), self.right.view(b, b, r, -1)
        return torch.einsum("ecar,aerd->cead", left, right).reshape(self.out_features, self.in_features)

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "blocks": self.blocks,
            "rank": self.rank,
        }

    @property
    def macs_per_token(self) -> int:
        return self.blocks * self.rank * (self.in_features + self.out_features)
