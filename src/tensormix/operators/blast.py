"""Blocks that share their factors along rows and columns: BLAST (arXiv 2410.21262).

Shape letters (this file): b blocks on each side, i = I / b, o = O / b, r rank, p and q blocks.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype
from tensormix.operators.block_tensor_train import nearest_divisor
from tensormix.operators.joint_fit import fit_jointly
from tensormix.operators.low_rank import LowRank


class Blast(StructuredLinear):
    """Block (p, q) of W is left_p diag(couplings_pq) right_q, with r (I + O + b^2) numbers and as many MACs.

    With all couplings 1 it is a low rank.

    Raises:
        ValueError: `blocks` does not divide both sizes, or `rank` is outside 1..min(I, O).
    """

    def __init__(self, in_features: int, out_features: int, *, blocks: int, rank: int) -> None:
        super().__init__(in_features, out_features)
        check_blocks(in_features, out_features, blocks)
        limit = min(in_features, out_features)
        if not 1 <= rank <= limit:
            raise ValueError(f"Blast: rank must be in 1..{limit} for a {in_features}x{out_features} layer, got {rank}")
        self.blocks, self.rank = blocks, rank
        self.left = nn.Parameter(torch.empty(out_features, rank))
        self.right = nn.Parameter(torch.empty(blocks * rank, in_features // blocks))
        self.couplings = nn.Parameter(torch.empty(blocks * blocks, rank))

    @classmethod
    def from_dense(cls, weight: Tensor, *, blocks: int, rank: int, steps: int = 100) -> Blast:  # (O, I)
        """From the nearest low rank on, all numbers together: never further from `weight` than that. The floor of one
        valley of many."""
        wide = weight.detach().to(torch.promote_types(computing_dtype(weight), torch.float64))
        op = cls.from_low_rank(LowRank.from_dense(wide, rank=rank), blocks=blocks)
        if steps:
            fit_jointly(op, wide, None, steps=steps)
        return op.to(weight)

    @classmethod
    def from_low_rank(cls, factors: LowRank, *, blocks: int) -> Blast:
        """The same matrix, in its dtype: couplings of 1."""
        op = cls(factors.in_features, factors.out_features, blocks=blocks, rank=factors.rank).to(factors.left)
        with torch.no_grad():
            op.left.copy_(factors.left)
            op.right.copy_(factors.right.unflatten(1, (blocks, -1)).transpose(0, 1).flatten(0, 1))
            op.couplings.fill_(1)
        return op

    @classmethod
    def from_factors(cls, weight: Tensor, left: Tensor, right: Tensor, couplings: Tensor) -> Blast:
        """From (b, o, r), (b, r, i) and (b, b, r), for the weight (O, I)."""
        O, I = weight.shape
        op = cls(I, O, blocks=left.shape[0], rank=left.shape[2]).to(left)
        with torch.no_grad():
            op.left.copy_(left.flatten(0, 1))
            op.right.copy_(right.flatten(0, 1))
            op.couplings.copy_(couplings.flatten(0, 1))
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        b, r = self.blocks, self.rank
        pieces = x.unflatten(-1, (b, -1)).unbind(-2)
        right = self.right.view(b, r, -1).unbind(0)
        inner = torch.stack([F.linear(piece, matrix) for piece, matrix in zip(pieces, right, strict=True)], -2)
        coupled = torch.einsum("...qr,pqr->...pr", inner, self.couplings.view(b, b, r)).unbind(-2)
        left = self.left.view(b, -1, r).unbind(0)
        return torch.cat([F.linear(piece, matrix) for piece, matrix in zip(coupled, left, strict=True)], -1)

    def to_dense(self) -> Tensor:  # (O, I)
        b, r = self.blocks, self.rank
        left, right = self.left.view(b, -1, r), self.right.view(b, r, -1)
        blocks = torch.einsum("por,pqr,qri->poqi", left, self.couplings.view(b, b, r), right)
        return blocks.reshape(self.out_features, self.in_features)

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {**ends, "blocks": self.blocks, "rank": self.rank}

    @property
    def macs_per_token(self) -> int:
        return self.rank * (self.in_features + self.out_features + self.blocks**2)


def check_blocks(in_features: int, out_features: int, blocks: int) -> None:
    """Raise ValueError unless `blocks` divides both sizes; the sentence names the nearest that does."""
    if blocks < 1 or in_features % blocks or out_features % blocks:
        common = gcd(in_features, out_features)
        raise ValueError(
            f"Blast: blocks must divide both sizes of a {in_features}x{out_features} layer, got {blocks}; the nearest "
            f"that does is {nearest_divisor(common, blocks)}"
        )
