"""Rounding that makes up for itself.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tensormix.fitting.output_error import output_error
from tensormix.fitting.rounding_steps import Columns, packed_part, round_corrected, round_factors
from tensormix.methods.rounding import Rounding, Seen
from tensormix.operators import Dense, LowRank, PerHead, Quantized, StructuredLinear
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

    def emptied(self, inner: StructuredLinear) -> Quantized:
        _check_inner(inner)
        return super().emptied(inner)

    def rounded(
        self, inner: StructuredLinear, weight: Tensor, seen: Seen | None
    ) -> tuple[Quantized, dict[str, Any]]:  # (O, I)
        assert seen is not None
        _check_inner(inner)
        held = seen.held_out
        damping = damping_for(self.damping, seen.num_tokens, weight.shape[1])
        plain = Quantized.of(inner, **self.rounding_sizes)
        facts: dict[str, Any] = {"rounding": "nearest", "calibration_tokens": seen.num_tokens}
        if bool(held.any() and (seen.gram - held).any()):  # else too few tokens to hold some out
            errors = {"nearest": _error(weight, plain, held)}
            errors["corrected"] = _error(weight, self.corrected(weight, inner, seen.gram - held, damping), held)
            facts |= {"rounding": min(errors, key=lambda name: errors[name]), "held_out_errors": errors}
        if facts["rounding"] == "nearest":
            return plain, facts
        return self.corrected(weight, inner, seen.gram, damping), facts

    def corrected(self, weight: Tensor, inner: StructuredLinear, gram: Tensor, damping: float) -> Quantized:
        """`inner`, which was fitted to `weight` (O, I), rounded by the inputs of this Gram matrix (I, I)."""
        columns = Columns.of(gram, damping)
        if isinstance(inner, Dense):
            return self.corrected_by(inner, columns)
        assert isinstance(inner, LowRank | PerHead)
        op = Quantized.of(inner, **self.rounding_sizes)
        left, right = inner.left.detach().double(), inner.right.detach().double()
        heads = inner.num_heads if isinstance(inner, PerHead) else 1
        round_factors(op, weight.double(), left, right, gram, columns, damping, heads)
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
    if not isinstance(inner, Dense | LowRank | PerHead):
        raise ValueError(
            f"gptq rounds a weight, or the two factors of a low rank, with correction, and a {type(inner).__name__} is "
            "neither: take rtn or hqq for it"
        )


def _error(weight: Tensor, op: Quantized, gram: Tensor) -> float:  # (O, I), (I, I)
    return output_error(weight.double() - op.to_dense().double(), gram)
