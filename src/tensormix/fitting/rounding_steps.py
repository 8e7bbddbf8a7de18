"""Rounding with correction (GPTQ, arXiv 2210.17323): what one column loses is made up for by the columns after it.

Shape letters: O rows, I columns, S groups of a row, G numbers of a group, A rows of scales, as in `Packed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormix.fitting.sparsegpt_step import BLOCK, inverse_factor
from tensormix.operators.quantized import Packed

SHRINKS = 25  # ends of a group that are tried
LEAST = 0.4  # of the whole range


def searched_grid(part: Packed, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:  # (O, I), (I,)
    """Scales and zeros (A, S), for each group those whose nearest numbers lose least of all cut ranges.

    A loss counts by the importance of its column: the mean square of the input.
    """
    wide, weights = part.grouped(weight), part.grouped(importance.expand_as(weight))  # (A, S, G)
    low, high = wide.amin(-1), wide.amax(-1)
    scales, zeros = part.grid(low, high)
    least = torch.full_like(low, torch.inf)
    for shrink in torch.linspace(1, LEAST, SHRINKS).tolist():
        tried = part.grid(shrink * low, shrink * high)
        numbers = (part.nearest(wide, *tried) - tried[1][..., None]) * tried[0][..., None]
        loss = (weights * (wide - numbers).square()).sum(-1)
        scales, zeros = (torch.where(loss < least, new, old) for new, old in zip(tried, (scales, zeros), strict=True))
        least = torch.minimum(loss, least)
    return scales, zeros


def corrected_codes(
    part: Packed, weight: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor, damping: float
) -> Tensor:  # (O, I), (I, I), (A, S), (A, S) -> (O, I)
    """Codes on a fixed grid with small tr((W' - W) gram (W' - W)^T), the columns by falling input size.

    Each column takes the nearest codes, and the columns after it the best step of theirs for what it lost: the optimal
    brain surgeon's update with the columns before it fixed. With inputs that are not correlated that is rounding to
    nearest.

    Args:
        damping: added to the diagonal of `gram`, times its mean; positive where `gram` is singular.
    """
    O, I = weight.shape
    order = gram.diagonal().argsort(descending=True, stable=True)
    damped = gram[order][:, order].clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    factor = inverse_factor(damped).to(weight)
    groups = (torch.arange(I, device=weight.device) // part.width).clamp(max=scales.shape[1] - 1)[order]
    of_column, middle = (part_.expand(O, -1)[:, groups].T for part_ in (scales, zeros))  # (I, O)
    work, codes = weight[:, order].T.clone(), torch.empty(I, O, dtype=weight.dtype, device=weight.device)
    for start in range(0, I, BLOCK):
        stop = min(start + BLOCK, I)
        errors = torch.zeros_like(work[start:stop])
        for j in range(start, stop):
            codes[j] = ((work[j] / of_column[j]).round() + middle[j]).clamp(0, part.top)
            errors[j - start] = (work[j] - (codes[j] - middle[j]) * of_column[j]) / factor[j, j]
            work[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.T
