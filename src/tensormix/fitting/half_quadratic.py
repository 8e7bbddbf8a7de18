"""Grids of integers found without data, for errors of which a few may be large (half-quadratic quantization).

Shape letters: O rows, I columns, S groups of a row, G numbers of a group, A rows of scales, as in `Packed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormix.fitting.rounding_steps import fitted_grid
from tensormix.operators.packed import Packed


def half_quadratic_grid(
    part: Packed,
    weight: Tensor,
    *,
    norm: float,
    steps: int,
    with_scales: bool,
    beta: float = 10.0,
    growth: float = 1.01,
) -> tuple[Tensor, Tensor]:  # (O, I) -> (A, S), (A, S)
    """Scales and zeros with a small sum of |W - (codes - zeros) scales|^norm, for each group the best of all steps.

    In turn: the codes that are nearest; the large errors, set apart by the proximal step of the norm; and the zeros
    (with `with_scales` the scales too) that are the least squares for the rest. The first grid holds the whole range.

    Args:
        norm: p, above 0 and at most 1.
        beta, growth: how near what is set apart is to the errors: beta grows by that factor at every step. Errors are
            measured in steps of the grid, so that neither depends on how large the weights are.
    """
    wide, there = part.grouped(weight), part.grouped(torch.ones_like(weight))  # (A, S, G); nothing in the padding
    scales, zeros = part.grid(wide.amin(-1), wide.amax(-1))
    best, least = (scales, zeros), torch.full_like(scales, torch.inf)
    for _ in range(steps + 1):
        codes = part.nearest(wide, scales, zeros)
        away = wide / scales[..., None] - (codes - zeros[..., None])  # in steps of the grid
        loss = (there * (away.abs() * scales[..., None]) ** norm).sum(-1)
        better = loss < least
        new, old = (scales, zeros), best
        best = (torch.where(better, new[0], old[0]), torch.where(better, new[1], old[1]))
        least = torch.minimum(loss, least)
        rest = wide - set_apart(away, norm, beta) * scales[..., None]
        if with_scales:
            scales, zeros = fitted_grid(part, rest, there, codes)
        else:
            middle = (there * (codes - rest / scales[..., None])).sum(-1) / there.sum(-1)
            zeros = (middle * part.parts).round().clamp(0, 2**part.zero_bits - 1) / part.parts
        beta *= growth
    return best


def set_apart(errors: Tensor, norm: float, beta: float) -> Tensor:
    """The proximal step of |e|^norm: sign(e) max(0, |e| - |e|^(norm - 1) / beta). Small errors become 0."""
    sizes = errors.abs()
    return errors.sign() * (sizes - sizes.clamp_min(torch.finfo(errors.dtype).tiny) ** (norm - 1) / beta).clamp_min(0)
