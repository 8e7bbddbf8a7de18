"""A Kronecker product of two small matrices: a cheap change of basis.

Shape letters (this file): A, B sizes of the two, A B = I = O.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype


class Kronecker(StructuredLinear):
    """W = outer ⊗ inner, square: A^2 + B^2 numbers and (A + B) MACs for each input.

    Raises:
        ValueError: `outer` does not divide the size, or the layer is not square.
    """

    def __init__(self, in_features: int, out_features: int, *, outer: int) -> None:
        super().__init__(in_features, out_features)
        if in_features != out_features or outer < 1 or in_features % outer:
            raise ValueError(
                f"Kronecker: outer must divide the size of a square layer, got outer={outer} for a "
                f"{in_features}x{out_features} layer"
            )
        self.outer_size = outer
        self.outer_factor = nn.Parameter(torch.empty(outer, outer))
        self.inner_factor = nn.Parameter(torch.empty(in_features // outer, in_features // outer))

    @classmethod
    def from_dense(cls, weight: Tensor, *, outer: int) -> Kronecker:  # (O, I)
        """The nearest in the Frobenius norm: the leading singular vectors of the rearranged weight (Van Loan 1993)."""
        op = cls(weight.shape[1], weight.shape[0], outer=outer).to(weight)
        A, B = outer, weight.shape[0] // outer
        wide = weight.detach().to(computing_dtype(weight))
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(wide.view(A, B, A, B).transpose(1, 2).reshape(A * A, B * B))
            op.outer_factor.copy_((s[0].sqrt() * u[:, 0]).view(A, A))
            op.inner_factor.copy_((s[0].sqrt() * vh[0]).view(B, B))
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y = F.linear(x.unflatten(-1, (self.outer_size, -1)), self.inner_factor)  # (..., A, B)
        return F.linear(y.transpose(-1, -2), self.outer_factor).transpose(-1, -2).flatten(-2)

    def to_dense(self) -> Tensor:  # (O, I)
        return torch.kron(self.outer_factor, self.inner_factor)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "outer": self.outer_size}

    @property
    def macs_per_token(self) -> int:
        return self.in_features * (self.outer_size + self.in_features // self.outer_size)
