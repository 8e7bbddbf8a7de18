"""Several operators side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormix.operators.base import StructuredLinear


class Sum(StructuredLinear):
    """W = W_1 + W_2 + ...

    Raises:
        ValueError: there are no terms, or their shapes differ.
    """

    def __init__(self, *, terms: Sequence[StructuredLinear]) -> None:
        shapes = sorted({(term.in_features, term.out_features) for term in terms})
        if len(shapes) != 1:
            found = ", ".join(f"{i}x{o}" for i, o in shapes) or "no terms"
            raise ValueError(f"Sum: needs one or more terms of one shape, got {found}")
        super().__init__(*shapes[0])
        self.terms = nn.ModuleList(terms)

    @classmethod
    def from_dense(cls, weight: Tensor, *, terms: Sequence[tuple[type[StructuredLinear], dict[str, Any]]]) -> Sum:
        """Greedy: each (operator class, its sizes) fits what the earlier terms left over of `weight` (O, I)."""
        left_over, fitted = weight.detach(), []
        for operator, sizes in terms:
            fitted.append(operator.from_dense(left_over, **sizes))
            left_over = left_over - fitted[-1].to_dense().detach()
        return cls(terms=fitted).to(weight)

    def _terms(self) -> list[StructuredLinear]:
        return [cast(StructuredLinear, term) for term in self.terms]

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        first, *others = self._terms()
        y = first(x)
        for term in others:
            y = y + term(x)
        return y

    def to_dense(self) -> Tensor:  # (O, I)
        return torch.stack([term.to_dense() for term in self._terms()]).sum(0)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"terms": [term.spec for term in self._terms()]}

    @property
    def macs_per_token(self) -> int:
        return sum(term.macs_per_token for term in self._terms())
