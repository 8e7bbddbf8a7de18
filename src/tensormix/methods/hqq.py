"""Rounding without data, on grids that large errors do not pull.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tensormix.fitting.half_quadratic import half_quadratic_grid
from tensormix.methods.rounding import Rounding, Seen
from tensormix.operators import Quantized, StructuredLinear
from tensormix.operators.base import computing_dtype


class Hqq(Rounding):
    """Every number becomes the nearest on its grid; the zero points are moved so that the sum of |error|^norm is small.

    A norm below 1 lets a few errors be large, so that outliers do not spoil the grid of the others. The zero points
    have 8 bits and lie between codes, as published; `with_scales` moves the scales too. Each group keeps the best of
    all steps, so it never loses more, by this norm, than on the grid of its whole range.
    """

    source = "Badri and Shaji 2023, half-quadratic quantization; the best of all steps and the moved scales are ours"
    summary = (
        "Small integers without data, on grids that are moved so that a few errors may be large and most are small."
    )

    name: Literal["hqq"] = "hqq"
    symmetric: Literal[False] = False  # it is the zero points that move
    zero_bits: Literal[8] | None = 8
    norm: float = Field(default=0.7, gt=0, le=1)  # p
    steps: int = Field(default=20, ge=1)
    with_scales: bool = False

    def rounded(
        self, inner: StructuredLinear, weight: Tensor, seen: Seen | None
    ) -> tuple[Quantized, dict[str, Any]]:  # (O, I)
        op = Quantized.of(inner, **self.rounding_sizes)
        numbers = dict(inner.named_parameters())
        for name, part in op.packed():
            matrix = numbers[name].detach().to(computing_dtype(numbers[name]))
            grid = half_quadratic_grid(part, matrix, norm=self.norm, steps=self.steps, with_scales=self.with_scales)
            part.put(*grid, part.nearest(part.grouped(matrix), *grid).flatten(1)[:, : part.length])
        return op, {}
