"""Two thin factors, of which as much of the longer as the shorter has is stored in 8 bits, beside the shorter itself.

Shape letters (this file): D = min(I, O), L = max(I, O).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype
from tensormix.operators.low_rank import LowRank
from tensormix.operators.packed import Packed


class Remapped(StructuredLinear):
    """W = left @ right, of rank at most R: both factors as integers of 8 bits, but for L - D rows of the longer one.

    The first D numbers of every column of the longer factor, and the shorter factor, have one scale per component; the
    rest stays in the dtype of the model. At 16 bits a rank costs 16 L bits, and 32 for its two scales, where plain
    factors cost 16 (I + O): every rank up to D is smaller than the dense weight, or as large. The integers do not
    train.

    Raises:
        ValueError: `rank` is outside 1..min(I, O).
    """

    longer: Packed
    shorter: Packed
    rest: nn.Parameter | None  # (R, L - D)

    def __init__(self, in_features: int, out_features: int, *, rank: int) -> None:
        super().__init__(in_features, out_features)
        short = min(in_features, out_features)
        if not 1 <= rank <= short:
            raise ValueError(
                f"Remapped: rank must be in 1..{short} for a {in_features}x{out_features} layer, got {rank}"
            )
        self.rank = rank
        self.longer = Packed((rank, short), bits=8, group="channel", symmetric=True)
        self.shorter = Packed((rank, short), bits=8, group="channel", symmetric=True)
        rest = abs(in_features - out_features)
        self.register_parameter("rest", nn.Parameter(torch.empty(rank, rest)) if rest else None)

    @classmethod
    def of(cls, operator: LowRank) -> Remapped:
        """`operator` with its factors brought to singular value form, then rounded; its bias moves over.

        Raises:
            ValueError: a factor holds NaN or infinite values.
        """
        I, O = operator.in_features, operator.out_features
        wide = computing_dtype(operator.weight)
        with torch.no_grad():
            (q, r), (p, t) = (torch.linalg.qr(m.to(wide)) for m in (operator.left, operator.right.T))
            if not (r.isfinite().all() and t.isfinite().all()):
                raise ValueError("Remapped: the factors hold NaN or infinite values")
            u, s, vh = torch.linalg.svd(r @ t.T)
            left, right = (q @ u * s.sqrt()).T, (s.sqrt()[:, None] * vh) @ p.T  # (R, O), (R, I)
            longer, shorter = (left, right) if O >= I else (right, left)
            with operator.weight.device:
                op = cls(I, O, rank=operator.rank).to(operator.weight.dtype)
            op.longer.round(longer[:, : min(I, O)])
            op.shorter.round(shorter)
            if op.rest is not None:
                op.rest.copy_(longer[:, min(I, O) :])
        op.bias = operator.bias
        return op

    @classmethod
    def from_dense(cls, weight: Tensor, *, rank: int) -> Remapped:  # (O, I)
        """The truncated SVD of this rank, rounded to nearest."""
        return cls.of(LowRank.from_dense(weight, rank=rank))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (O, R), (R, I)
        """What the integers stand for, and the rest."""
        longer, shorter = self.longer(dtype), self.shorter(dtype)  # (R, D)
        if self.rest is not None:
            longer = torch.cat([longer, self.rest.to(dtype)], dim=1)  # (R, L)
        return (longer.T, shorter) if self.out_features >= self.in_features else (shorter.T, longer)

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        left, right = self.factors(x.dtype)
        return F.linear(F.linear(x, right), left)

    def to_dense(self) -> Tensor:  # (O, I)
        longer, shorter = (part.numbers(self.weight.dtype) for part in (self.longer, self.shorter))
        dense = torch.einsum("rl,rd->ld", longer, shorter)  # (D, D)
        if self.rest is not None:
            dense = torch.cat([dense, torch.einsum("rl,rd->ld", self.rest, shorter)])  # (L, D)
        return dense if self.out_features >= self.in_features else dense.T

    @property
    def sizes(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}

    @property
    def macs_per_token(self) -> int:
        return self.rank * (self.in_features + self.out_features)
