"""Low rank at a learned rank, with plain or remapped storage.

Shape letters: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.ranks import rank_for
from tensormix.fitting.whitening import factor_root, gram_root, low_rank, output_basis, widened
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import LowRank, Remapped
from tensormix.statistics import Gram, QRFactor

_BITS = 16  # of a number of the dense weight, where `keep` counts bits


class _Needs:
    """What a method needs depends on its settings; asked of the class it is what the defaults need."""

    def __get__(self, method: DobiSvd | None, owner: type) -> tuple[type, ...]:
        return (QRFactor,) if method is not None and method.pca == "incremental" else (Gram,)


class DobiSvd(LinearMethod):
    """W' = V V^T W, with V the R leading principal components of the outputs W x of the calibration inputs.

    Of all matrices of rank R it has the smallest squared error of these outputs. The components are those of W G W^T,
    G the Gram matrix of the inputs ("covariance"), or come batch by batch from the QR factor of the inputs, which
    gives what an incremental PCA of the outputs gives that cuts nothing off ("incremental"). They are not centred: a
    linear layer has no place for a mean. The published code runs the PCA over singular vectors of single sequences,
    which counts weak directions of a sequence like strong ones.

    Each site's rank is meant to be learned: `tensormix.allocation.learned.learned` gives them for a whole model, one
    rule with its `rank` for each site. `storage` "remapped" (see Remapped) keeps about (I + O) / max(I, O) times the
    rank for the same bits, where bitsandbytes' map of 8 bits is replaced by evenly spaced integers.
    """

    source = "arXiv 2502.02723"
    summary = "Two thin factors from the principal components of the outputs, at a learned rank, plain or in 8 bits."
    needs: ClassVar[Any] = _Needs()

    size = "rank"
    largest = 1  # of any layer; a budget gives the rank

    name: Literal["dobi_svd"] = "dobi_svd"
    rank: int | None = Field(default=None, ge=1)
    keep: float | None = Field(default=None, gt=0, le=1)  # fraction of the dense bits to keep, at 16 bits a number
    storage: Literal["plain", "remapped"] = "plain"
    pca: Literal["covariance", "incremental"] = "covariance"

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.rank is None) == (self.keep is None):
            got = "none of them" if self.rank is None else "both"
            raise ValueError(f"DobiSvd: takes either rank (a learned one) or keep (a fraction), got {got}")
        return self

    @property
    def is_differentiable(self) -> bool:
        return super().is_differentiable and self.storage == "plain"

    @property
    def learned_storage(self) -> str:
        return self.storage

    def allowed_sizes(self, in_features: int, out_features: int) -> range:
        return range(1, self._limits(in_features, out_features)[1] + 1)

    def spectrum(self, weight: Tensor, stats: Statistics) -> Tensor:  # (O, I) -> (K,)
        """Of the factors as they are before their rounding to 8 bits."""
        wide, root = widened(weight, self._root(stats))
        return torch.linalg.svdvals(wide @ root)

    def _root(self, stats: Statistics) -> Tensor:  # (I, K)
        return factor_root(stats[QRFactor].factor) if self.pca == "incremental" else gram_root(stats[Gram].mean)

    def empty(self, in_features: int, out_features: int) -> LowRank | Remapped:
        operator = Remapped if self.storage == "remapped" else LowRank
        with torch.device("meta"):
            return operator(in_features, out_features, rank=self.rank_at(in_features, out_features))

    def fit(self, weight: Tensor, stats: Statistics) -> LowRank | Remapped:  # (O, I)
        """Raises ValueError if the layer does not allow the rank, or the statistic saw no token, only zeros, or NaN."""
        rank = self.rank_at(weight.shape[1], weight.shape[0])
        wide, root = widened(weight, self._root(stats))
        basis = output_basis(wide, root, rank)
        right = basis.T @ wide
        scale = right.norm(dim=1).sqrt()
        scale = torch.where(scale > 0, scale, 1)  # each column as long as its row
        factors = low_rank(wide, basis * scale, right / scale[:, None])
        return Remapped.of(factors).to(weight.dtype) if self.storage == "remapped" else factors.to(weight.dtype)

    def rank_at(self, in_features: int, out_features: int) -> int:
        """`rank`, or the largest whose storage `keep` allows.

        Raises:
            ValueError: no rank fits, or `rank` stores as much as the dense weight or more.
        """
        dense, remapped = in_features * out_features, self.storage == "remapped"
        per_rank, largest = self._limits(in_features, out_features)
        layer = f"a {in_features}x{out_features} layer"
        if self.keep is not None and not remapped:
            return rank_for("DobiSvd", self.keep, in_features, out_features)
        rank = self.rank if self.keep is None else min(floor(self.keep * _BITS * dense / per_rank + 1e-9), largest)
        assert rank is not None
        if largest < 1:
            raise ValueError(f"DobiSvd: rank 1 of {layer} stores as much as the dense weight; leave this layer dense.")
        if rank < 1:
            smallest = ceil(per_rank / (_BITS * dense) * 1e4) / 1e4
            raise ValueError(
                f"DobiSvd: keep={self.keep} leaves no rank for {layer}; the smallest usable keep is {smallest:.4f}."
            )
        if rank > largest:
            raise ValueError(
                f"DobiSvd: rank {rank} of {layer} stores as much as the dense weight or more with {self.storage} "
                f"storage; the largest rank is {largest}."
            )
        return rank

    def _limits(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Bits of each rank, and the largest rank that stores less than the dense weight."""
        remapped = self.storage == "remapped"
        per_rank = _BITS * max(in_features, out_features) + 32 if remapped else _BITS * (in_features + out_features)
        return per_rank, min((_BITS * in_features * out_features - 1) // per_rank, in_features, out_features)
