"""Preconditioned conjugate gradients for many least-squares problems that share one matrix.

Shape letters: B problems, K unknowns of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOOK_BACK = 5  # steps whose gain decides whether more of them pay

Map = Callable[[Tensor], Tensor]  # (B, K) -> (B, K), the same linear map for each of the problems


@dataclass(frozen=True)
class Solution:
    """Where the steps ended."""

    values: Tensor  # (B, K)
    steps: int
    residual: float  # norm of the preconditioned gradient beside what it was at the start
    decrease: float  # of the squared errors of all problems together


def conjugate_gradients(
    apply: Map, precondition: Map, start: Tensor, gradient: Tensor, *, error: float, tolerance: float, max_steps: int
) -> Solution:  # (B, K), (B, K)
    """Lower the sum over problems of x^T A x - 2 b^T x, each with step lengths of its own, from `start`.

    A may be singular if b is in its range: what of `start` A does not see stays as it is. It ends when the last
    `LOOK_BACK` steps lowered the squared error by no more than `tolerance` times what is left of it, when nothing is
    left of it but rounding, or after `max_steps` steps. A problem whose preconditioned gradient has fallen to 16
    machine epsilons of its first one stays where it is, else rounding would drive it through directions that A does
    not see. Every step lowers the error, so any end is no worse than the start.

    Args:
        apply: A, symmetric and not negative.
        precondition: near the inverse of A, symmetric and positive.
        gradient: b - A start.
        error: the squared error at `start`.
    """
    values, gradient = start.clone(), gradient.clone()
    direction = precondition(gradient)
    size = _dot(gradient, direction)  # (B, 1)
    first, enough = float(size.sum()), (16 * torch.finfo(start.dtype).eps) ** 2 * size
    gains: list[float] = []
    for _ in range(max_steps):
        left_over = error - sum(gains)
        slow = len(gains) >= LOOK_BACK and sum(gains[-LOOK_BACK:]) <= tolerance * left_over
        moving = size > enough
        if slow or left_over <= torch.finfo(start.dtype).eps * error or not bool(moving.any()):
            break
        image = apply(direction)
        length = torch.where(moving, _ratio(size, _dot(direction, image)), 0)
        values += length.to(values) * direction
        gradient -= length.to(values) * image
        gains.append(float((length * size).sum()))
        previous, preconditioned = size, precondition(gradient)
        size = _dot(gradient, preconditioned)
        direction = preconditioned + _ratio(size, previous).to(values) * direction
    residual = (float(size.sum()) / first) ** 0.5 if first > 0 else 0.0
    return Solution(values, len(gains), residual, sum(gains))


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (B, K), (B, K) -> (B, 1)
    return (a * b).sum(1, keepdim=True, dtype=torch.float64)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and zero where b is not positive: a problem that has arrived stays where it is."""
    return torch.where(b > 0, a / b, 0).nan_to_num(posinf=0.0)
