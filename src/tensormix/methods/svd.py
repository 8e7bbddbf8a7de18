"""Truncated SVD."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.ranks import keeps, rank_for
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import LowRank
from tensormix.operators.base import computing_dtype


class Svd(LinearMethod):
    """The nearest weight of low rank in the Frobenius norm; no data."""

    source = "Eckart and Young 1936"
    summary = "Two thin factors from the truncated singular value decomposition of the weight."

    size = "keep"
    largest = 1.0

    name: Literal["svd"] = "svd"
    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters to keep

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        return keeps(in_features, out_features)

    def spectrum(self, weight: Tensor, stats: Statistics) -> Tensor:  # (O, I) -> (K,)
        return torch.linalg.svdvals(weight.detach().to(computing_dtype(weight)))

    def empty(self, in_features: int, out_features: int) -> LowRank:
        with torch.device("meta"):
            return LowRank(in_features, out_features, rank=self.rank(in_features, out_features))

    def fit(self, weight: Tensor, stats: Statistics) -> LowRank:  # (O, I)
        return LowRank.from_dense(weight, rank=self.rank(weight.shape[1], weight.shape[0]))

    def rank(self, in_features: int, out_features: int) -> int:
        """The largest rank whose two factors hold at most `keep` of the dense parameters.

        Raises:
            ValueError: not even rank 1 fits.
        """
        return rank_for("Svd", self.keep, in_features, out_features)
