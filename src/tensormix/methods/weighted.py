"""What the methods share that are fitted to the weight, or, where asked, to the outputs on calibration inputs.

Shape letters: I in_features, O out_features, K directions of the inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeVar

from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.output_error import output_error
from tensormix.fitting.whitened_fit import fit_whitened
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import StructuredLinear
from tensormix.statistics import Gram

Kind = TypeVar("Kind", bound=StructuredLinear)


class _Needs:
    """What a method needs depends on its settings; asked of the class it is what the defaults need."""

    def __get__(self, method: Weighted | None, owner: type) -> tuple[type, ...]:
        return () if method is None else method.statistics()


class Weighted(LinearMethod):
    """A method with a size by `keep` or `rank`, and a fit to the weight or, with `weighted`, to its outputs.

    Raises ValueError unless exactly one of `keep` and `rank` is given.
    """

    needs: ClassVar[Any] = _Needs()

    size = "keep"
    largest = 1.0

    keep: float | None = Field(default=None, gt=0, le=1)  # fraction of the dense numbers
    rank: int | None = Field(default=None, ge=1)
    weighted: bool = False  # whether the error of the outputs on calibration inputs counts, or that of the weight
    steps: int = Field(default=100, ge=0)  # of L-BFGS at most, on all numbers together; 0 leaves its start

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.keep is None) == (self.rank is None):
            got = "none of them" if self.rank is None else "both"
            raise ValueError(f"{self.name}: takes either keep (a fraction) or rank, got {got}")
        return self

    def statistics(self) -> tuple[type, ...]:
        """What these settings need."""
        return (Gram,) if self.weighted else ()

    def fit(self, weight: Tensor, stats: Statistics) -> StructuredLinear:  # (O, I)
        """Raises ValueError if the layer does not allow the sizes, or the inputs were all zero or not finite."""
        return self.fit_with_facts(weight, stats)[0]

    @abstractmethod
    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[StructuredLinear, dict[str, Any]]:  # (O, I)
        """`fit`, and how it went."""

    def fit_to_outputs(
        self, starts: Sequence[Kind], weight: Tensor, gram: Tensor, root: Tensor
    ) -> tuple[Kind, dict[str, Any]]:  # (O, I), (I, I), (I, K)
        """From the start with the smallest error of the outputs all numbers together, which never raises that error."""
        op = min(starts, key=lambda start: output_error(weight - start.to_dense().detach(), gram))
        return op, fit_whitened(op, weight, root, steps=self.steps) if self.steps else {}
