"""Nothing at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tensormix.operators.base import StructuredLinear


class Zero(StructuredLinear):
    """W = 0. With a bias it is a constant output."""

    @classmethod
    def from_dense(cls, weight: Tensor) -> Zero:  # (O, I)
        O, I = weight.shape
        return cls(I, O).to(weight)

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return x.new_zeros(*x.shape[:-1], self.out_features)

    def to_dense(self) -> Tensor:  # (O, I)
        return self.weight.new_zeros(self.out_features, self.in_features)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    @property
    def macs_per_token(self) -> int:
        return 0
