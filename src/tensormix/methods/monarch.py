"""Two block-diagonal factors with an index shuffle between, the rival of chained mixtures.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from math import ceil
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.ranks import keeps, rank_for
from tensormix.fitting.whitened_fit import fit_whitened, whitened
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import Monarch as MonarchOperator
from tensormix.statistics import Gram


class MonarchMethod(LinearMethod):
    """A low rank for every slice of the weight: Monarch, and with a rank above 1 a block tensor train.

    The start is the projection of the weight, a truncated SVD of every slice; then both factors are fitted together to
    the outputs, by L-BFGS on the dense form. With one block it is a low rank.
    """

    source = "arXiv 2204.00595 and 2406.06248; the fit to the outputs is ours"
    summary = "Two block-diagonal factors with an index shuffle between, projected and then fitted to the outputs."
    needs = (Gram,)
    size = "keep"
    largest = 1.0

    name: Literal["monarch"] = "monarch"
    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters to keep
    blocks: int = Field(default=4, ge=1)  # of each factor; must divide both sizes of the layer
    steps: int = Field(default=200, ge=1)  # of L-BFGS, at most

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        """Those of whole ranks in every block; none where the blocks do not divide the layer."""
        if in_features % self.blocks or out_features % self.blocks:
            return ()
        return keeps(in_features, out_features)[self.blocks - 1 :: self.blocks]

    def empty(self, in_features: int, out_features: int) -> MonarchOperator:
        with torch.device("meta"):
            return MonarchOperator(in_features, out_features, **self._sizes(in_features, out_features))

    def fit(self, weight: Tensor, stats: Statistics) -> MonarchOperator:  # (O, I)
        """Raises ValueError if the layer does not allow the sizes, or the inputs were all zero or not finite."""
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[MonarchOperator, dict[str, Any]]:  # (O, I)
        wide, root = whitened(weight, stats[Gram].mean)
        op = MonarchOperator.from_dense(wide, **self._sizes(weight.shape[1], weight.shape[0]))
        facts = fit_whitened(op, wide, root, steps=self.steps)
        return op.to(weight), facts

    def _sizes(self, in_features: int, out_features: int) -> dict[str, int]:
        rank = rank_for("Monarch", self.keep, in_features, out_features) // self.blocks
        if rank == 0:
            smallest = ceil(self.blocks * (in_features + out_features) / (in_features * out_features) * 1e4) / 1e4
            raise ValueError(
                f"Monarch: keep={self.keep} leaves no rank for {self.blocks} blocks of a {in_features}x{out_features} "
                f"layer; the smallest usable keep is {smallest:.4f}."
            )
        return {"blocks": self.blocks, "rank": min(rank, min(in_features, out_features) // self.blocks)}
