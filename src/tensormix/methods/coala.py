"""Low rank on the calibration inputs without a Gram matrix and without an inverse.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.ranks import keeps, rank_for
from tensormix.fitting.whitening import factor_root, low_rank, output_basis, widened
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import LowRank
from tensormix.statistics import QRFactor


class Coala(LinearMethod):
    """The W' of low rank with the smallest ||(W - W') X||_F^2 + m ||W - W'||_F^2, m = mu ||X||_F^2 / I.

    W' = U U^T W, with U the leading left singular vectors of W [R; sqrt(m) identity]^T and R the QR factor of X^T. The
    left factor U is orthonormal. In exact arithmetic `mu` is the `ridge` of svd_llm; the larger it is, the nearer the
    result to the truncated SVD.
    """

    source = "arXiv 2507.07580"
    summary = "Two thin factors with the smallest output error over the calibration inputs, from their QR factor."
    needs = (QRFactor,)

    size = "keep"
    largest = 1.0

    name: Literal["coala"] = "coala"
    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters to keep
    mu: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # regularisation, times the mean eigenvalue of X X^T

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        return keeps(in_features, out_features)

    def spectrum(self, weight: Tensor, stats: Statistics) -> Tensor:  # (O, I) -> (K,)
        wide, root = widened(weight, factor_root(stats[QRFactor].factor, self.mu))
        return torch.linalg.svdvals(wide @ root)

    def empty(self, in_features: int, out_features: int) -> LowRank:
        with torch.device("meta"):
            return LowRank(in_features, out_features, rank=rank_for("Coala", self.keep, in_features, out_features))

    def fit(self, weight: Tensor, stats: Statistics) -> LowRank:  # (O, I)
        """Raises ValueError if the rank is 0, or the statistic saw no token, only zeros, or NaN."""
        rank = rank_for("Coala", self.keep, weight.shape[1], weight.shape[0])
        wide, root = widened(weight, factor_root(stats[QRFactor].factor, self.mu))
        basis = output_basis(wide, root, rank)
        return low_rank(weight, basis, basis.T @ wide)
