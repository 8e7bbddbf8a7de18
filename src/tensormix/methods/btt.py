"""Block tensor trains.

Shape letters: I in_features, O out_features, a in_blocks, b out_blocks, i = I / a.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.whitened_fit import whitened
from tensormix.methods.base import Statistics
from tensormix.methods.weighted import Weighted
from tensormix.operators import BlockTensorTrain
from tensormix.operators.block_tensor_train import check_blocks, nearest_divisor
from tensormix.statistics import Gram

_RIDGE = 1e-3  # of the mean eigenvalue of each block: a direction that no input has stays in reach


class BttMethod(Weighted):
    """A low rank for every slice of the weight, with blocks near the square roots of its sizes: a truncated SVD each.

    Without `weighted` that is the nearest there is. With it the start is the better of that and of the same in the
    norm of each block's inputs; then both factors are fitted together.
    """

    source = "arXiv 2406.06248; the fit to the outputs is ours"
    summary = "Two block-diagonal factors of any numbers of blocks, projected, or fitted to the outputs."

    name: Literal["btt"] = "btt"
    in_blocks: int | None = Field(default=None, ge=1)  # none: the divisor nearest the square root
    out_blocks: int | None = Field(default=None, ge=1)

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        dense, (per_rank, largest) = in_features * out_features, self._limits(in_features, out_features)
        return tuple(min(1.0, ceil(rank * per_rank / dense * 1e6) / 1e6) for rank in range(1, largest + 1))

    def empty(self, in_features: int, out_features: int) -> BlockTensorTrain:
        with torch.device("meta"):
            return BlockTensorTrain(in_features, out_features, **self.sizes_at(in_features, out_features))

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[BlockTensorTrain, dict[str, Any]]:  # (O, I)
        sizes = self.sizes_at(weight.shape[1], weight.shape[0])
        plain = BlockTensorTrain.from_dense(weight.detach().double(), **sizes)
        if not self.weighted:
            return plain.to(weight), {}
        gram = stats[Gram].mean.double().to(weight.device)
        wide, root = whitened(weight, gram)
        op, facts = self.fit_to_outputs([plain, _on_blocks(wide, gram, sizes)], wide, gram, root)
        return op.to(weight), facts

    def blocks_at(self, in_features: int, out_features: int) -> tuple[int, int]:
        """The blocks of the inputs and outputs. Raises ValueError if they do not divide them."""
        a = nearest_divisor(in_features, in_features**0.5) if self.in_blocks is None else self.in_blocks
        b = nearest_divisor(out_features, out_features**0.5) if self.out_blocks is None else self.out_blocks
        check_blocks(in_features, out_features, a, b)
        return a, b

    def sizes_at(self, in_features: int, out_features: int) -> dict[str, int]:
        """The sizes of the operator.

        Raises:
            ValueError: the blocks do not divide the sizes, no rank fits, or `rank` is more than possible or would hold
                more numbers than the dense weight.
        """
        (a, b), dense = self.blocks_at(in_features, out_features), in_features * out_features
        per_rank, largest = self._limits(in_features, out_features)
        layer = f"{a} and {b} blocks of the inputs and outputs of a {in_features}x{out_features} layer"
        if largest == 0:
            raise ValueError(f"btt: rank 1 of {layer} stores {per_rank} numbers, the dense weight {dense}; take others")
        if self.rank is not None and self.rank > largest:
            raise ValueError(f"btt: rank {self.rank} is too large for {layer}; the largest usable rank is {largest}.")
        rank = self.rank if self.keep is None else min(largest, floor(self.keep * dense / per_rank + 1e-9))
        if not rank:
            smallest = ceil(per_rank / dense * 1e6) / 1e6
            raise ValueError(
                f"btt: keep={self.keep} leaves no rank for {layer}; the smallest usable keep is {smallest:g}."
            )
        return {"in_blocks": a, "out_blocks": b, "rank": rank}

    def _limits(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Numbers of each rank, and the largest rank that is possible and holds no more than the dense weight."""
        a, b = self.blocks_at(in_features, out_features)
        per_rank = b * in_features + a * out_features
        return per_rank, min(in_features * out_features // per_rank, in_features // a, out_features // b)


def _on_blocks(weight: Tensor, gram: Tensor, sizes: dict[str, int]) -> BlockTensorTrain:  # (O, I), (I, I)
    """A truncated SVD of every slice in the norm of its inputs: the optimum where blocks do not correlate."""
    a, i = sizes["in_blocks"], len(gram) // sizes["in_blocks"]
    blocks = gram.view(a, i, a, i).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (a, i, i)
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(i).to(gram)
    roots = torch.linalg.cholesky(blocks + ridge)  # S_α with S_α S_α^T the Gram matrix of its inputs
    scaled = torch.einsum("oad,ade->oae", weight.unflatten(1, (a, i)), roots).flatten(1)
    op = BlockTensorTrain.from_dense(scaled, **sizes)
    with torch.no_grad():
        undone = torch.linalg.solve_triangular(roots, op.right.view(a, -1, i), upper=False, left=False)
        op.right.copy_(undone.flatten(0, 1))
    return op
