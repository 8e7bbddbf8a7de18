"""Truncated SVD of the whitened weight.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.ranks import keeps, rank_for
from tensormix.fitting.whitening import balanced, gram_factor, gram_root, output_basis, refit_left, widened
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import LowRank
from tensormix.statistics import DenseGram, Gram, PropagatedGram


class _Needs:
    """What a method needs depends on its settings; asked of the class it is what the defaults need."""

    def __get__(self, method: SvdLlm | None, owner: type) -> tuple[type, ...]:
        return (DenseGram, PropagatedGram) if method is not None and method.update else (Gram,)


class SvdLlm(LinearMethod):
    """The weight of low rank with the smallest squared error of the outputs over the calibration inputs.

    With G = X X^T = S S^T and U S' V^T = svd(W S) the published factors are U_r sqrt(S'_r) and sqrt(S'_r) V_r^T S^-1.
    Their product is U_r U_r^T W, which is how it is computed: S, from Cholesky or where that fails from eigenvectors,
    is never inverted, and G may be singular. The squared error is the sum of the squared singular values of W S that
    are cut off.

    With `update`, that fit sees the inputs of the dense model; then, with the right factor fixed, the left one is
    fitted by least squares to W x~ for the inputs x~ that passed through the compressed blocks.
    """

    source = "arXiv 2403.07378; a root by eigendecomposition as in arXiv 2503.12340"
    summary = "Two thin factors with the smallest output error over the calibration inputs, from their Gram matrix."
    needs: ClassVar[Any] = _Needs()

    size = "keep"
    largest = 1.0

    name: Literal["svd_llm"] = "svd_llm"
    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters to keep
    update: bool = False  # step 2 of the paper: the left factor once more, on what the compressed blocks pass on
    ridge: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # added to G, times its mean eigenvalue

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        return keeps(in_features, out_features)

    def spectrum(self, weight: Tensor, stats: Statistics) -> Tensor:  # (O, I) -> (K,)
        """Without `update`, whose second fit can only lower the error on what the compressed blocks pass on."""
        seen = stats[DenseGram if self.update else Gram]
        wide, root = widened(weight, gram_root(seen.mean, self.ridge))
        return torch.linalg.svdvals(wide @ root)

    def empty(self, in_features: int, out_features: int) -> LowRank:
        with torch.device("meta"):
            return LowRank(in_features, out_features, rank=rank_for("SvdLlm", self.keep, in_features, out_features))

    def fit(self, weight: Tensor, stats: Statistics) -> LowRank:  # (O, I)
        """Raises ValueError if the rank is 0, or a statistic saw no token, only zeros, or NaN."""
        rank = rank_for("SvdLlm", self.keep, weight.shape[1], weight.shape[0])
        seen = stats[DenseGram if self.update else Gram]
        factor, noise = gram_factor(seen.mean, self.ridge)
        wide, root = widened(weight, factor)
        left = output_basis(wide, root, rank, noise)
        right = left.T @ wide
        if self.update:
            _, root = widened(weight, gram_root(stats[PropagatedGram].mean, self.ridge))
            left = refit_left(wide, left, right, root)
        return balanced(weight, left, right)
