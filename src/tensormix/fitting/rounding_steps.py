"""Rounding with correction (GPTQ, arXiv 2210.17323): what one column loses is made up for by the columns after it.

Shape letters: O rows, I columns, S groups of a row, G numbers of a group, A rows of scales, as in `Packed`; R rank, H
heads, C channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensormix.fitting.sparsegpt_step import inverse_factor
from tensormix.fitting.whitening import solved
from tensormix.operators import Quantized
from tensormix.operators.packed import Packed

SHRINKS = 25  # ends of a group that are tried
LEAST = 0.4  # of the whole range
FEW_COLUMNS = 32  # that are updated one by one, and all after them together
REFITS = 8  # of scales and zeros to the codes that are nearest on them


def searched_grid(part: Packed, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:  # (O, I), (I,) or (O, I)
    """Scales and zeros (A, S), for each group those whose nearest numbers lose least of all cut ranges.

    A loss counts by the importance of its column, the mean square of the input, or of its number. Where zeros may lie
    between codes, the best grid for those codes follows, and the nearest codes on it, in turn: no step raises the loss.
    """
    wide, weights = part.grouped(weight), part.grouped(importance.expand_as(weight))  # (A, S, G)
    low, high = wide.amin(-1), wide.amax(-1)
    scales, zeros = part.grid(low, high)
    least = torch.full_like(low, torch.inf)
    for shrink in torch.linspace(1, LEAST, SHRINKS).tolist():
        scales, zeros, least = _better(
            part, wide, weights, part.grid(shrink * low, shrink * high), scales, zeros, least
        )
    for _ in range(REFITS if part.zeros is not None and part.parts > 1 else 0):
        codes = part.nearest(wide, scales, zeros)
        scales, zeros, least = _better(
            part, wide, weights, fitted_grid(part, wide, weights, codes), scales, zeros, least
        )
    return scales, zeros


def _better(
    part: Packed, wide: Tensor, weights: Tensor, tried: tuple[Tensor, Tensor], scales: Tensor, zeros: Tensor,
    least: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # (A, S, G), (A, S, G), (A, S) each  # fmt: skip
    """For each group the grid that loses less, and what it loses."""
    numbers = (part.nearest(wide, *tried) - tried[1][..., None]) * tried[0][..., None]
    loss = (weights * (wide - numbers).square()).sum(-1)
    scales, zeros = (torch.where(loss < least, new, old) for new, old in zip(tried, (scales, zeros), strict=True))
    return scales, zeros, torch.minimum(loss, least)


def fitted_grid(part: Packed, wide: Tensor, weights: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:  # (A, S, G) each
    """The line through numbers over codes that loses least, as a grid that can be stored."""
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    code, number = ((weights * each).sum(-1, keepdim=True) / total for each in (codes, wide))  # means
    spread = (weights * (codes - code).square()).sum(-1)
    slope = (weights * (codes - code) * (wide - number)).sum(-1) / spread.clamp_min(torch.finfo(wide.dtype).tiny)
    low = number[..., 0] - slope * code[..., 0]
    high = torch.where(slope > 0, low + slope * part.top, 0)
    return part.grid(torch.where(slope > 0, low, 0), high, covers=False)


class Columns(NamedTuple):
    """The columns of a weight by falling input size, and how what one loses is spread over those after it."""

    order: Tensor  # (I,)
    factor: Tensor  # (I, I) upper triangular U, fp64, of the columns in that order, with U^T U the inverse of the Gram
    sizes: Tensor  # (I,) mean squares of the inputs, in the order of the weight

    @classmethod
    def of(cls, gram: Tensor, damping: float) -> Columns:  # (I, I)
        """`damping` is added to the diagonal of `gram`, times its mean; positive where `gram` is singular."""
        order = gram.diagonal().argsort(descending=True, stable=True)
        damped = gram.double()[order][:, order]
        mean = gram.diagonal().mean()
        damped.diagonal().add_(damping * mean if mean > 0 else 1)
        return cls(order, inverse_factor(damped), gram.diagonal().clamp(min=0))


def corrected_codes(
    part: Packed, weight: Tensor, columns: Columns, scales: Tensor, zeros: Tensor, exact: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # (O, I), ..., (A, S), (A, S) -> (O, I), (O, I)
    """Codes on a fixed grid with small tr((W' - W) gram (W' - W)^T), in the dtype of the weight.

    Each column takes the nearest codes, and the columns after it the best step of theirs for what it lost: the optimal
    brain surgeon's update with the columns before it fixed. With inputs that are not correlated that is rounding to
    nearest.

    Args:
        exact: (O, I), where something beside the codes makes up for what they lose: nothing is lost there.

    Returns:
        The codes, and what each number was meant to be when its turn came.
    """
    O, I = weight.shape
    order, factor = columns.order, columns.factor.to(weight)
    groups = (torch.arange(I, device=weight.device) // part.width).clamp(max=scales.shape[1] - 1)[order]
    of_column, middle = (each.to(weight).expand(O, -1)[:, groups].T.contiguous() for each in (scales, zeros))  # (I, O)
    whole = middle.floor()
    lossy = None if exact is None else ~exact[:, order].T
    work, codes = weight[:, order].T.clone(), torch.empty(I, O, dtype=weight.dtype, device=weight.device)
    for start in range(0, I, FEW_COLUMNS):
        stop = min(start + FEW_COLUMNS, I)
        errors = torch.zeros_like(work[start:stop])
        for j in range(start, stop):
            codes[j] = ((work[j] / of_column[j] + (middle[j] - whole[j])).round() + whole[j]).clamp(0, part.top)
            errors[j - start] = (work[j] - (codes[j] - middle[j]) * of_column[j]) / factor[j, j]
            if lossy is not None:
                errors[j - start] *= lossy[j]
            work[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    found, meant = torch.empty_like(codes), torch.empty_like(codes)
    found[order], meant[order] = codes, work
    return found.T, meant.T


def packed_part(op: Quantized, name: str) -> Packed:
    """The integers of a parameter of the inner operator."""
    part = getattr(op, name)
    assert isinstance(part, Packed)
    return part


def round_corrected(part: Packed, weight: Tensor, columns: Columns) -> None:  # (O, I)
    """Fill `part` with the weight, rounded with correction on the grid that suits it."""
    scales, zeros = searched_grid(part, weight, columns.sizes.to(weight))
    part.put(scales, zeros, corrected_codes(part, weight, columns, scales, zeros)[0])


def round_factors(
    op: Quantized, weight: Tensor, left: Tensor, right: Tensor, gram: Tensor, columns: Columns, damping: float,
    heads: int = 1,
) -> None:  # (H C, I), (H C, R), (H R, I), (I, I), all fp64  # fmt: skip
    """Fill the two factors of a low rank, or of one for each head: the right one rounded by the inputs, the left one
    fitted anew to what that became, by least squares on what it passes on, and rounded by that.

    Args:
        damping: of the Gram matrix of what is passed on, as in `Columns.of`.
    """
    round_corrected(packed_part(op, "right"), right, columns)
    right = packed_part(op, "right").numbers(weight.dtype)
    targets, passed_on = [], []
    for wanted, ours, theirs in zip(*(each.chunk(heads) for each in (weight, left, right)), strict=True):
        passed = theirs @ gram @ theirs.T  # (R, R)
        step = solved(passed, (wanted - ours @ theirs) @ gram @ theirs.T)
        targets.append(ours if step is None else ours + step)
        passed_on.append(Columns.of(passed, damping))
    part, whole = packed_part(op, "left"), torch.cat(targets)
    sizes = torch.cat([each.sizes.expand_as(target) for each, target in zip(passed_on, targets, strict=True)])
    grid = searched_grid(part, whole, sizes)
    spread = (each.expand(len(whole), -1).chunk(heads) for each in grid)
    codes = [
        corrected_codes(part, target, each, *own)[0]
        for target, each, *own in zip(targets, passed_on, *spread, strict=True)
    ]
    part.put(*grid, torch.cat(codes))
