"""Truncated SVD."""

from __future__ import annotations

from math import ceil, floor
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.methods.base import LinearMethod, Statistics
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
        per_rank = (in_features + out_features) / (in_features * out_features)
        rank = floor(self.keep / per_rank + 1e-9)  # the margin undoes the rounding of keep
        if rank < 1:
            smallest = ceil(per_rank * 1e4) / 1e4
            raise ValueError(
                f"Svd: keep={self.keep} leaves no rank for a {in_features}x{out_features} layer; "
                f"the smallest usable keep is {smallest:.4f}."
            )
        return rank
