"""The tensor mixture that is best on calibration inputs.

Shape letters: I in_features, O out_features, N num_branches, Q, P output / input size of a core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormix.fitting.conjugate_gradients import Solution, conjugate_gradients
from tensormix.fitting.mixt_normal import MixtNormal
from tensormix.operators import MixT
from tensormix.operators.mixt_matching import match

Facts = dict[str, Any]


def fit_aware(
    op: MixT, weight: Tensor, gram: Tensor, *, tolerance: float, max_steps: int
) -> Facts:  # (O, I), (I, I) of one dtype
    """Give the cores of `op` the values with the smallest tr((weight - W) gram (weight - W)^T).

    Starts from the cores that match the weight itself, and is never worse on the inputs than these. Computed in the
    dtype of `weight` and `gram`, which may be singular; where the inputs leave a choice, the start decides.

    Returns:
        fit_steps; fit_residual, the preconditioned gradient beside that of the start; fit_precision; output_error and
        matched_output_error, the root of that trace beside that of the weight alone, at the end and at the start.
    """
    normal = MixtNormal(op, gram)
    start = match(weight, op.windows, (op.core_out, op.core_in)) / op.num_branches
    parts, found, error = descend(normal, weight, start, tolerance=tolerance, max_steps=max_steps)
    set_cores(op, parts)
    whole = sum(float((rows @ gram * rows).sum(dtype=torch.float64)) for rows in weight.split(512))
    return {
        "fit_steps": found.steps,
        "fit_residual": found.residual,
        "fit_precision": str(weight.dtype).removeprefix("torch."),
        "output_error": (max(error - found.decrease, 0.0) / whole) ** 0.5 if whole > 0 else None,
        "matched_output_error": (error / whole) ** 0.5 if whole > 0 else None,
    }


def descend(
    normal: MixtNormal, weight: Tensor, start: Tensor, *, tolerance: float, max_steps: int
) -> tuple[Tensor, Solution, float]:  # (O, I), (N, Q, P) -> (N, Q, P)
    """Parts c with smaller tr((weight - W) gram (weight - W)^T) than `start`, and what that is at `start`.

    Parts are cores divided by num_branches: W is the sum of what they stand for.
    """
    op = normal.op
    left_over = normal.image(start).neg_()
    left_over[: op.out_features, : op.in_features] += weight
    gradient, error = normal.gradient(left_over)
    found = conjugate_gradients(
        normal.apply,
        normal.precondition,
        normal.pack(start),
        gradient,
        error=error,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return normal.unpack(found.values), found, error


def set_cores(op: MixT, parts: Tensor) -> None:  # (N, Q, P)
    """The cores of these parts."""
    with torch.no_grad():
        for core, part in zip(op.cores, parts, strict=True):
            core.copy_(part * op.num_branches)
