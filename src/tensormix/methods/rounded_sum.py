"""What the methods share that round a weight and fit something beside it to what rounding loses.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.output_error import output_error
from tensormix.fitting.rounding_steps import Columns
from tensormix.methods.base import Statistics
from tensormix.methods.gptq import Gptq, damping_for
from tensormix.methods.rounding import IntegerGrid
from tensormix.operators import Dense, Quantized, StructuredLinear, Sum
from tensormix.statistics import Gram, HeldOutGram

PATIENCE = 2  # rounds in a row that may gain nothing


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight and what its errors count by."""

    weight: Tensor  # (O, I), fp64
    gram: Tensor  # (I, I), fp64, of the inputs, damped: positive definite
    columns: Columns  # of that Gram matrix
    like: Tensor  # (O, I), the weight as the model has it
    is_corrected: bool  # whether rounding makes up for itself here


Pair = tuple[Quantized, StructuredLinear]


class RoundedSum(IntegerGrid):
    """A weight on a grid of integers plus a correction, fitted in turn to the calibration inputs.

    Without a correction it is `gptq`, and its choice between rounding with correction and rounding to nearest, by
    held-out tokens, is kept. The best round is the result; `round_errors` in the row, relative and by the damped Gram
    matrix, has the best so far after each one. They end when two in a row gain nothing.
    """

    needs = (Gram, HeldOutGram)
    largest: ClassVar[Any] = 0

    symmetric: bool = False
    correction_bits: Literal[2, 3, 4, 8] | None = 4  # of each number of the correction; None: as the weight has it
    rounds: int = Field(default=6, ge=1)  # at most
    damping: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # times the mean eigenvalue; None: by tokens

    @abstractmethod
    def correction(self, in_features: int, out_features: int) -> StructuredLinear | None:
        """What stands beside the integers, on meta and not yet rounded; None for nothing.

        Raises:
            ValueError: the layer does not allow this size.
        """

    @abstractmethod
    def pairs(self, problem: Problem, rounded: Quantized) -> Iterator[Pair]:
        """One round after another, from the weight rounded alone."""

    def empty(self, in_features: int, out_features: int) -> StructuredLinear:
        with torch.device("meta"):
            rounded = Quantized(inner=Dense(in_features, out_features), **self.rounding_sizes)
            inner = self.correction(in_features, out_features)
            if inner is None:
                return rounded
            beside = inner if self.correction_bits is None else Quantized(inner=inner, **self._correction_sizes)
            return Sum(terms=[rounded, beside])

    def fit(self, weight: Tensor, stats: Statistics) -> StructuredLinear:  # (O, I)
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[StructuredLinear, dict[str, Any]]:  # (O, I)
        with torch.device("meta"):
            inner = self.correction(weight.shape[1], weight.shape[0])
        rounded, facts = self.alone.fit_with_facts(weight, stats)
        if inner is None:
            return rounded, facts
        gram = stats[Gram].mean.to(weight.device).double()
        damping = damping_for(self.damping, stats[Gram].num_tokens, weight.shape[1])
        damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        columns = Columns.of(damped, 0.0)
        problem = Problem(weight.detach().double(), damped, columns, weight.detach(), facts["rounding"] == "corrected")
        best, errors = _best(problem, islice(self.pairs(problem, rounded), self.rounds))
        whole = output_error(problem.weight, damped)
        facts["round_errors"] = [error / whole if whole > 0 else 0.0 for error in errors]
        return Sum(terms=list(best)).to(weight), facts

    @property
    def alone(self) -> Gptq:
        """The same rounding without a correction."""
        shared = {name: getattr(self, name) for name in Gptq.model_fields.keys() & type(self).model_fields.keys()}
        return Gptq(**{**shared, "name": "gptq"})

    def rounded_again(self, problem: Problem, target: Tensor) -> Quantized:  # (O, I)
        """What is nearest to `target` on the grid, by what counts in this problem."""
        inner = Dense.from_dense(target.to(problem.like))
        if not problem.is_corrected:
            return Quantized.of(inner, **self.rounding_sizes)
        return self.alone.corrected_by(inner, problem.columns)

    def rounded_beside(self, inner: StructuredLinear) -> StructuredLinear:
        """The correction as it is stored."""
        return inner if self.correction_bits is None else Quantized.of(inner, **self._correction_sizes)

    @property
    def _correction_sizes(self) -> dict[str, Any]:
        return {"bits": self.correction_bits, "group": self.rounding_sizes["group"], "symmetric": True}


def _best(problem: Problem, pairs: Iterator[Pair]) -> tuple[Pair, list[float]]:
    """The pair with the smallest error, and the smallest error so far after each of them."""
    found: Pair | None = None
    errors: list[float] = []
    for pair in pairs:
        error = output_error(problem.weight - sum(part.to_dense().detach().double() for part in pair), problem.gram)
        if found is None or error < errors[-1]:
            found = pair
        errors.append(min([error, *errors[-1:]]))
        if len(errors) > PATIENCE and errors[-1] == errors[-1 - PATIENCE]:
            break
    assert found is not None
    return found, errors
