"""Blocks with shared factors.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.blast_steps import descend
from tensormix.fitting.whitened_fit import whitened
from tensormix.fitting.whitening import best_on_inputs
from tensormix.methods.base import Statistics
from tensormix.methods.weighted import Weighted
from tensormix.operators import Blast, LowRank
from tensormix.operators.blast import check_blocks
from tensormix.statistics import Gram


class BlastMethod(Weighted):
    """Blocks left_p diag(couplings_pq) right_q, from the best low rank of the same rank on by L-BFGS.

    So its error, of the weight or with `weighted` of the outputs, is never above that of low rank. The published fit,
    `published: true` with `steps: 300`, starts at noise, sees the weight alone, and takes preconditioned gradient steps
    on one factor after another.

    Raises ValueError for a published fit that is weighted.
    """

    source = "arXiv 2410.21262; the start at low rank and the fit of all numbers together are ours"
    summary = "Blocks that share their factors along rows and columns, each pair coupled by a diagonal."

    name: Literal["blast"] = "blast"
    blocks: int = Field(default=16, ge=1)  # on each side; must divide both sizes of the layer
    published: bool = False  # whether the fit is the published one

    @model_validator(mode="after")
    def _published_sees_no_inputs(self) -> BlastMethod:
        if self.published and self.weighted:
            raise ValueError("blast: the published fit sees the weight alone; leave out one of published and weighted")
        return self

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        """Of the ranks those that are the largest within some 64th of the dense numbers."""
        dense, (per_rank, largest) = in_features * out_features, self._limits(in_features, out_features)
        ranks = dict.fromkeys(min(largest, dense * step // 64 // per_rank) for step in range(1, 65))
        return tuple(min(1.0, ceil(rank * per_rank / dense * 1e6) / 1e6) for rank in ranks if rank)

    def empty(self, in_features: int, out_features: int) -> Blast:
        with torch.device("meta"):
            rank = self.rank_at(in_features, out_features)
            return Blast(in_features, out_features, blocks=self.blocks, rank=rank)

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[Blast, dict[str, Any]]:  # (O, I)
        rank = self.rank_at(weight.shape[1], weight.shape[0])
        wide = weight.detach().double()
        if self.published:
            return Blast.from_factors(wide, *descend(wide, self.blocks, rank, self.steps)).to(weight), {}
        if not self.weighted:
            return Blast.from_dense(wide, blocks=self.blocks, rank=rank, steps=self.steps).to(weight), {}
        gram = stats[Gram].mean.double().to(weight.device)
        wide, root = whitened(weight, gram)
        nearest: LowRank = best_on_inputs(wide, root, rank)
        op, facts = self.fit_to_outputs([Blast.from_low_rank(nearest, blocks=self.blocks)], wide, gram, root)
        return op.to(weight), facts

    def rank_at(self, in_features: int, out_features: int) -> int:
        """`rank`, or the largest that `keep` allows.

        Raises:
            ValueError: the blocks do not divide the sizes, no rank fits, or `rank` is more than possible or would hold
                more numbers than the dense weight.
        """
        per_rank, largest = self._limits(in_features, out_features)
        dense, layer = in_features * out_features, f"{self.blocks} blocks of a {in_features}x{out_features} layer"
        if largest == 0:
            raise ValueError(
                f"blast: rank 1 of {layer} stores {per_rank} numbers, the dense weight {dense}; take fewer"
            )
        if self.rank is not None and self.rank > largest:
            raise ValueError(f"blast: rank {self.rank} is too large for {layer}; the largest usable rank is {largest}.")
        rank = self.rank if self.keep is None else min(largest, floor(self.keep * dense / per_rank + 1e-9))
        if not rank:
            smallest = ceil(per_rank / dense * 1e6) / 1e6
            raise ValueError(
                f"blast: keep={self.keep} leaves no rank for {layer}; the smallest usable keep is {smallest:g}."
            )
        return rank

    def _limits(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Numbers of each rank, and the largest rank that is possible and holds no more than the dense weight."""
        check_blocks(in_features, out_features, self.blocks)
        per_rank = in_features + out_features + self.blocks**2
        return per_rank, min(in_features * out_features // per_rank, in_features, out_features)
