"""An operator of a larger size, its inputs filled with zeros and its outputs cropped."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear


class Padded(StructuredLinear):
    """W = the upper left (O, I) part of the inner operator's W.

    Raises:
        ValueError: the inner operator is smaller than the layer.
    """

    def __init__(self, in_features: int, out_features: int, *, inner: StructuredLinear) -> None:
        super().__init__(in_features, out_features)
        if inner.in_features < in_features or inner.out_features < out_features:
            raise ValueError(
                f"Padded: the inner operator must be at least as large as the {in_features}x{out_features} layer, "
                f"got {inner.in_features}x{inner.out_features}"
            )
        self.inner = inner

    @classmethod
    def from_dense(
        cls, weight: Tensor, *, inner_type: type[StructuredLinear], padded: tuple[int, int], **sizes: Any
    ) -> Padded:
        """`inner_type.from_dense(..., **sizes)` of `weight` (O, I), filled with zeros to the shape `padded`.

        The padded rows and columns count in that fit although they are cropped: it is near the best, not the best.
        """
        O, I = weight.shape
        filled = F.pad(weight.detach(), (0, padded[1] - I, 0, padded[0] - O))
        return cls(I, O, inner=inner_type.from_dense(filled, **sizes)).to(weight)

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        x = F.pad(x, (0, self.inner.in_features - self.in_features))
        return self.inner(x)[..., : self.out_features]

    def to_dense(self) -> Tensor:  # (O, I)
        return self.inner.to_dense()[: self.out_features, : self.in_features]

    @property
    def sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "inner": self.inner.spec}

    @property
    def macs_per_token(self) -> int:
        return self.inner.macs_per_token
