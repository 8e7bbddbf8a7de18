"""Rounding that makes up for itself.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tensormix.fitting.output_error import output_error
from tensormix.fitting.rounding_steps import Columns, packed_part, round_corrected, round_factors
from tensormix.fitting.whitening import check_inputs
from tensormix.methods.base import Statistics
from tensormix.methods.rounding import Rounding
from tensormix.operators import Dense, LowRank, Quantized, StructuredLinear
from tensormix.operators.base import computing_dtype
from tensormix.statistics import Gram, HeldOutGram

FEW = 10  # tokens per column: with fewer a Gram matrix says little about small directions
DAMPING = (0.01, 0.1)  # with enough tokens, with few


class _Needs:
    """The Gram matrices, and what the inner method needs."""

    def __get__(self, method: Gptq | None, _: Any = None) -> tuple[Any, ...]:
        own = (Gram, HeldOutGram)
        inner = () if method is None or method.of is None else method.of.needs
        return (*own, *(kind for kind in inner if kind not in own))


class Gptq(Rounding):
    """Small integers found column by column: what rounding one column loses, the columns after it make up for.

    The range of each group is cut where that loses least. An eighth of the tokens is held out: where they say that
    plain rounding is better, which happens with few tokens, it is kept (`rounding` in the row says which it was, and
    `calibration_tokens` how many tokens there were).

    With `of`, a method that gives a low rank: the right factor is rounded so, the left one is fitted anew to what that
    became, and rounded too, by the inputs that it gets.
    """

    source = "arXiv 2210.17323; the choice by held-out tokens, cut ranges and the refit of low rank are ours"
    summary = "Small integers found column by column; each column makes up for what those before it lost."
    needs = _Needs()

    name: Literal["gptq"] = "gptq"
    symmetric: bool = False
    damping: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # times the mean eigenvalue; None: by tokens

    def empty(self, in_features: int, out_features: int) -> Quantized:
        made = super().empty(in_features, out_features)
        _check_inner(made.inner)
        return made

    def fit(self, weight: Tensor, stats: Statistics) -> Quantized:  # (O, I)
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[Quantized, dict[str, Any]]:  # (O, I)
        weight = weight.detach()
        inner = Dense.from_dense(weight) if self.of is None else self.of.fit(weight, stats)
        _check_inner(inner)
        every, held = stats[Gram].mean.to(weight.device).double(), stats[HeldOutGram].mean.to(weight.device).double()
        check_inputs(every)
        damping = damping_for(self.damping, stats[Gram].num_tokens, weight.shape[1])
        plain = Quantized.of(inner, **self.rounding_sizes)
        facts: dict[str, Any] = {"rounding": "nearest", "calibration_tokens": stats[Gram].num_tokens}
        if bool(held.any() and (every - held).any()):  # else too few tokens to hold some out
            errors = {"nearest": _error(weight, plain, held)}
            errors["corrected"] = _error(weight, self.corrected(weight, inner, every - held, damping), held)
            facts |= {"rounding": min(errors, key=lambda name: errors[name]), "held_out_errors": errors}
        if facts["rounding"] == "nearest":
            return plain, facts
        return self.corrected(weight, inner, every, damping), facts

    def corrected(self, weight: Tensor, inner: StructuredLinear, gram: Tensor, damping: float) -> Quantized:
        """`inner`, which was fitted to `weight` (O, I), rounded by the inputs of this Gram matrix (I, I)."""
        columns = Columns.of(gram, damping)
        if isinstance(inner, Dense):
            return self.corrected_by(inner, columns)
        assert isinstance(inner, LowRank)
        op = Quantized.of(inner, **self.rounding_sizes)
        left, right = inner.left.detach().double(), inner.right.detach().double()
        round_factors(op, weight.double(), left, right, gram, columns, damping)
        return op

    def corrected_by(self, inner: Dense, columns: Columns) -> Quantized:
        """A weight rounded with correction by the inputs of these columns."""
        op = Quantized.of(inner, **self.rounding_sizes)
        matrix = inner.matrix.detach()
        round_corrected(packed_part(op, "matrix"), matrix.to(computing_dtype(matrix)), columns)
        return op


def damping_for(given: float | None, num_tokens: int, in_features: int) -> float:
    """What is added to a Gram matrix, times the mean of its diagonal."""
    return given or DAMPING[num_tokens < FEW * in_features]


def _check_inner(inner: StructuredLinear) -> None:
    if not isinstance(inner, Dense | LowRank):
        raise ValueError(
            f"gptq rounds a weight, or the two factors of a low rank, with correction, and a {type(inner).__name__} is "
            "neither: take rtn for it"
        )


def _error(weight: Tensor, op: Quantized, gram: Tensor) -> float:  # (O, I), (I, I)
    return output_error(weight.double() - op.to_dense().double(), gram)
