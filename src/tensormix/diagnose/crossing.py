"""Where the growth of the mean drift changes: two straight lines that meet (arXiv 2605.25344, Fig. 4b).

For a LLaMA2-7B the paper finds a slope of about 0.006 per block before the boundary and 0.016 after it; the crossing
of the two lines lies near the transition boundary. The fit is the least-squares continuous curve of two segments whose
joint may lie anywhere (Hudson 1966): it is either where two separate lines meet within the gap between the points they
were fitted to, or at one of the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Two segments that meet at `depth`; slopes are per compressed block."""

    depth: float
    value: float  # height of the joint
    slope_before: float
    slope_after: float
    residual: float  # sum of squared distances

    def row(self) -> dict[str, float | str]:
        return {
            "kind": "drift_crossing",
            "value": self.depth,
            "height": self.value,
            "slope_before": self.slope_before,
            "slope_after": self.slope_after,
        }


def fit_crossing(depths: Sequence[float], values: Sequence[float]) -> Crossing:
    """The best two-segment continuous fit of values (mean drifts) against depths (numbers of compressed blocks).

    Raises ValueError for fewer than four points (two lines need two each), depths that repeat, or values not finite.
    """
    x, y = np.asarray(depths, dtype=float), np.asarray(values, dtype=float)
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"crossing: two lines need at least 4 depths with a value each, got {len(x)} and {len(y)}")
    if len(np.unique(x)) < len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("crossing: every depth must be there once, and all depths and values must be finite")
    order = np.argsort(x)
    x, y = x[order], y[order]
    fits = [_at(x, y, float(joint)) for joint in x[1:-1]]
    for count in range(2, len(x) - 1):
        joint = _meeting(x, y, count)
        if joint is not None and x[count - 1] < joint < x[count]:
            fits.append(_at(x, y, joint))
    return min(fits, key=lambda fit: fit.residual)


def _meeting(x: NDArray[np.float64], y: NDArray[np.float64], count: int) -> float | None:
    """Where the line through the first `count` points meets the line through the others."""
    slope_before, start_before = np.polyfit(x[:count], y[:count], 1)
    slope_after, start_after = np.polyfit(x[count:], y[count:], 1)
    turn = slope_after - slope_before
    return None if turn == 0 else float((start_before - start_after) / turn)


def _at(x: NDArray[np.float64], y: NDArray[np.float64], joint: float) -> Crossing:
    """Least squares of height + slope_before * min(x - joint, 0) + slope_after * max(x - joint, 0)."""
    columns = np.stack([np.ones_like(x), np.minimum(x - joint, 0), np.maximum(x - joint, 0)], axis=1)
    (height, before, after), *_ = np.linalg.lstsq(columns, y, rcond=None)
    residual = float(((columns @ (height, before, after) - y) ** 2).sum())
    return Crossing(
        depth=joint, value=float(height), slope_before=float(before), slope_after=float(after), residual=residual
    )
