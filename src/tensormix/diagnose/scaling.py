"""Loss against parameters: the trend of a dense family, and where compressed descendants lie beside it.

arXiv 2605.25344, Fig. 1c. The trend is L(N) = floor + scale * N^-exponent, least squares in L with a floor of at least
zero; from two dense models alone it is the power law through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensormix.rows import Row

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """L(N) = floor + scale * N^-exponent, N in parameters."""

    floor: float  # nats
    scale: float
    exponent: float
    residual: float  # root mean square over the dense family, nats

    def __call__(self, parameters: float) -> float:
        return self.floor + self.scale * parameters**-self.exponent


def fit_trend(parameters: Sequence[float], losses: Sequence[float]) -> Trend:
    """The trend of a family of dense models.

    Raises ValueError for fewer than two sizes, sizes that repeat, and numbers that are not positive.
    """
    sizes, values = np.asarray(parameters, dtype=float), np.asarray(losses, dtype=float)
    if len(sizes) != len(values) or len(sizes) < 2:
        raise ValueError(f"scaling: a trend needs at least 2 dense models with a loss each, got {len(sizes)}")
    if len(np.unique(sizes)) < len(sizes) or not (np.isfinite(values).all() and min(*sizes, *values) > 0):
        raise ValueError("scaling: dense models must differ in size, and sizes and losses must be positive numbers")
    if len(sizes) == 2:
        exponent = float(np.log(values[0] / values[1]) / np.log(sizes[1] / sizes[0]))
        return Trend(floor=0.0, scale=float(values[0] * sizes[0] ** exponent), exponent=exponent, residual=0.0)
    low, high = 0.001, 4.0
    for _ in range(8):  # each round looks ten times closer around the best exponent
        grid = np.geomspace(low, high, 41)
        best = int(np.argmin([_fit(sizes, values, exponent)[0] for exponent in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    exponent = float(grid[best])
    squares, floor, scale = _fit(sizes, values, exponent)
    return Trend(floor=floor, scale=scale, exponent=exponent, residual=float(np.sqrt(squares / len(sizes))))


def _fit(sizes: Array, values: Array, exponent: float) -> tuple[float, float, float]:
    """(sum of squares, floor, scale) of the best line in N^-exponent."""
    unit = float(np.exp(np.log(sizes).mean()))  # so that the column has values around one
    column = (sizes / unit) ** -exponent
    slope, start = np.polyfit(column, values, 1)
    if start < 0:
        slope, start = float(column @ values / (column @ column)), 0.0
    residual = values - start - slope * column
    return float(residual @ residual), float(start), float(slope * unit**exponent)


def scaling_rows(dense: Sequence[Row], compressed: Sequence[Row]) -> list[Row]:
    """The trend of the dense models and every model beside it.

    Each row given holds `model`, `parameters` and `loss` (nats); it comes back as a row of kind "scaling" with what the
    trend expects there and the residual: below zero is better than a dense model of that size would be.
    Raises ValueError as `fit_trend` does.
    """
    trend = fit_trend([row["parameters"] for row in dense], [row["loss"] for row in dense])
    rows: list[Row] = [
        {
            "kind": "scaling_trend",
            "floor": trend.floor,
            "scale": trend.scale,
            "exponent": trend.exponent,
            "value": trend.residual,
            "num_models": len(dense),
        }
    ]
    for family, members in (("dense", dense), ("compressed", compressed)):
        for row in members:
            expected = trend(row["parameters"])
            rows.append({"kind": "scaling", "family": family, **row, "expected": expected,
                         "residual": row["loss"] - expected})  # fmt: skip
    return rows
