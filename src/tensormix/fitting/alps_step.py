"""ALPS (arXiv 2406.07831): the entries of a sparse weight by ADMM, their values by conjugate gradients.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tensormix.fitting.output_error import output_error
from tensormix.operators.sparse import UNSTRUCTURED, largest

WINDOW = 3  # steps between two looks at how far the support has moved
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # rho grows by this if more than that fraction of the support changed


@dataclass(frozen=True)
class ScaledGram:
    """gram with a unit diagonal, and its eigendecomposition: what every ALPS step with the same inputs shares."""

    scale: Tensor  # (I,) the root of the diagonal that was divided out
    gram: Tensor  # (I, I) = vectors diag(values) vectors^T
    values: Tensor  # (I,)
    vectors: Tensor  # (I, I)

    @classmethod
    def of(cls, gram: Tensor, dtype: torch.dtype) -> Self:
        """For a `gram` whose diagonal is positive."""
        scale = gram.diagonal().sqrt()
        unit = gram / scale / scale[:, None]
        values, vectors = torch.linalg.eigh(unit)
        return cls(scale.to(dtype), unit.to(dtype), values.clamp_min(0).to(dtype), vectors.to(dtype))


def alps(
    target: Tensor,
    scaled: ScaledGram,
    *,
    num_values: int,
    pattern: str = UNSTRUCTURED,
    rho: float = 0.1,
    max_steps: int = 300,
    refit_steps: int = 10,
) -> tuple[Tensor, Tensor]:  # (O, I) -> (O, I), (O, I)
    """A sparse S with small tr((target - S) gram (target - S)^T), and the mask of its stored entries.

    ADMM splits S into a free copy and one that is projected on its largest entries, both in the units of the scaled
    problem. It stops when the support has stood still for three steps; `refit` then finds the values on it. Where the
    inputs are hardly correlated a small rho ends above the largest entries of the scaled target: then those are taken.

    Args:
        rho: the penalty for the difference of the copies at the start; it grows while the support moves.
        max_steps: of ADMM.
        refit_steps: conjugate-gradient steps at the end.
    """
    goal = target * scaled.scale
    pull = goal @ scaled.gram
    first = mask = before = largest(goal.abs(), num_values=num_values, pattern=pattern)
    kept = magnitude = torch.where(mask, goal, 0)
    dual = rho * (goal - kept)
    for step in range(1, max_steps + 1):
        free = ((pull - dual + rho * kept) @ scaled.vectors / (scaled.values + rho)) @ scaled.vectors.T
        wanted = free + dual / rho
        mask = largest(wanted.abs(), num_values=num_values, pattern=pattern)
        kept = torch.where(mask, wanted, 0)
        dual = dual + rho * (free - kept)
        if step % WINDOW == 0:
            moved = int((mask ^ before).sum()) / num_values
            if moved == 0:
                break
            rho *= next(growth for least, growth in GROWTH if moved > least)
            before = mask
    values = refit(goal, scaled.gram, mask, kept, steps=refit_steps)
    if output_error(goal - magnitude, scaled.gram) < output_error(goal - values, scaled.gram):
        mask, values = first, refit(goal, scaled.gram, first, magnitude, steps=refit_steps)
    return values / scaled.scale, mask


def refit(target: Tensor, gram: Tensor, mask: Tensor, start: Tensor, *, steps: int) -> Tensor:  # (O, I), (I, I), ...
    """The S that is zero outside `mask` with the smallest tr((target - S) gram (target - S)^T), nearer with each step.

    Conjugate gradients for every row by itself, from `start`. They stop before `steps` if the gradient on the mask has
    fallen to 16 machine epsilons of what it was at the start.
    """
    values = torch.where(mask, start, 0)
    residual = torch.where(mask, (target - values) @ gram, 0)
    direction, size = residual, residual.square().sum(1, keepdim=True)  # (O, 1)
    enough = (16 * torch.finfo(target.dtype).eps) ** 2 * size
    for _ in range(steps):
        if bool((size <= enough).all()):
            break
        image = torch.where(mask, direction @ gram, 0)
        length = _ratio(size, (direction * image).sum(1, keepdim=True))
        values = values + length * direction
        residual = residual - length * image
        previous, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(size, previous) * direction
    return values


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and zero where b is: a row that has arrived stays where it is."""
    return torch.where(b > 0, a / b, 0)
