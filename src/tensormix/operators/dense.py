"""The plain matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear


class Dense(StructuredLinear):
    """W = matrix: no structure of its own, something for other operators to wrap."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.matrix = nn.Parameter(torch.empty(out_features, in_features))

    @classmethod
    def from_dense(cls, weight: Tensor) -> Dense:  # (O, I)
        O, I = weight.shape
        op = cls(I, O).to(weight)
        with torch.no_grad():
            op.matrix.copy_(weight)
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return F.linear(x, self.matrix)

    def to_dense(self) -> Tensor:  # (O, I)
        return self.matrix.clone()

    @property
    def sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    @property
    def macs_per_token(self) -> int:
        return self.in_features * self.out_features
