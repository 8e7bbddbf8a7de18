"""Truncated SVD."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.methods.base import LinearMethod, Statistics
from tensormix.methods.ranks import rank_for
from tensormix.operators import LowRank


class Svd(LinearMethod):
    """The nearest weight of low rank in the Frobenius norm; no data."""

    source = "Eckart and Young 1936"
    summary = "Two thin factors from the truncated singular value decomposition of the weight."

    name: Literal["svd"] = "svd"
    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters to keep

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
