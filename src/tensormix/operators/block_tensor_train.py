"""Two block-diagonal factors with an index shuffle between, of any number of blocks: the block tensor train of arXiv
2406.06248.

Shape letters (this file): a in_blocks, b out_blocks, i = I / a, o = O / b, r rank; [x, y] the index
x * (size of y) + y.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype


class BlockTensorTrain(StructuredLinear):
    """W[(c, β), (α, d)] = sum_r left[(β, c), (α, r)] right[(α, β, r), d]; α < a and β < b are blocks, c < o, d < i.

    For each pair of blocks (α, β) the o x i slice has rank r. It stores r (b I + a O) numbers, with as many MACs.

    Raises:
        ValueError: the blocks do not divide the sizes, or the rank of a slice is outside 1..min(i, o).
    """

    def __init__(self, in_features: int, out_features: int, *, in_blocks: int, out_blocks: int, rank: int) -> None:
        super().__init__(in_features, out_features)
        check_blocks(in_features, out_features, in_blocks, out_blocks)
        limit = min(in_features // in_blocks, out_features // out_blocks)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"BlockTensorTrain: rank must be in 1..{limit} for {in_blocks} and {out_blocks} blocks of the inputs "
                f"and outputs of a {in_features}x{out_features} layer, got {rank}"
            )
        self.in_blocks, self.out_blocks, self.rank = in_blocks, out_blocks, rank
        self.left = nn.Parameter(torch.empty(out_features, in_blocks * rank))
        self.right = nn.Parameter(torch.empty(in_blocks * out_blocks * rank, in_features // in_blocks))

    @classmethod
    def from_dense(cls, weight: Tensor, **sizes: Any) -> Self:  # (O, I)
        """The nearest in the Frobenius norm: a truncated SVD of every slice."""
        O, I = weight.shape
        op = cls(I, O, **sizes).to(weight)
        a, b, rank = op.in_blocks, op.out_blocks, op.rank
        slices = weight.detach().to(computing_dtype(weight)).reshape(O // b, b, a, I // a)
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(
                slices.permute(1, 2, 0, 3), full_matrices=False
            )  # (β, α, o, ·), ..., (β, α, ·, i)
            root = s[..., :rank].sqrt()
            op.left.copy_((u[..., :rank] * root[..., None, :]).permute(0, 2, 1, 3).reshape(op.left.shape))
            op.right.copy_((root[..., None] * vh[..., :rank, :]).transpose(0, 1).reshape(op.right.shape))
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        a, b, r = self.in_blocks, self.out_blocks, self.rank
        rows = x.reshape(-1, a, self.in_features // a)  # (N, α, i)
        right = self.right.view(a, b * r, -1).unbind(0)
        inner = [F.linear(rows[:, block], matrix) for block, matrix in enumerate(right)]  # α times (N, (β, r))
        shuffled = torch.stack(inner, 1).view(len(rows), a, b, r).transpose(1, 2).reshape(len(rows), b, a * r)
        left = self.left.view(b, -1, a * r).unbind(0)
        outer = [F.linear(shuffled[:, block], matrix) for block, matrix in enumerate(left)]  # β times (N, o)
        return torch.stack(outer, -1).reshape(*x.shape[:-1], self.out_features)

    def to_dense(self) -> Tensor:  # (O, I)
        a, b, r = self.in_blocks, self.out_blocks, self.rank
        left, right = self.left.view(b, -1, a, r), self.right.view(a, b, r, -1)
        return torch.einsum("ecar,aerd->cead", left, right).reshape(self.out_features, self.in_features)

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {**ends, "in_blocks": self.in_blocks, "out_blocks": self.out_blocks, "rank": self.rank}

    @property
    def macs_per_token(self) -> int:
        return self.rank * (self.out_blocks * self.in_features + self.in_blocks * self.out_features)


def check_blocks(in_features: int, out_features: int, in_blocks: int, out_blocks: int) -> None:
    """Raise ValueError unless both divide their sizes; the sentence names the nearest that does."""
    for name, width, blocks in (("in_blocks", in_features, in_blocks), ("out_blocks", out_features, out_blocks)):
        if blocks < 1 or width % blocks:
            raise ValueError(
                f"BlockTensorTrain: {name} must divide {width} for a {in_features}x{out_features} layer, got {blocks}; "
                f"the nearest that does is {nearest_divisor(width, blocks)}"
            )


def nearest_divisor(width: int, wanted: float) -> int:
    """The divisor of `width` with the smallest ratio to `wanted`; of two the smaller one."""
    divisors = (divisor for divisor in range(1, width + 1) if width % divisor == 0)
    wanted = max(wanted, 1)
    return min(divisors, key=lambda divisor: max(divisor / wanted, wanted / divisor))
