"""The published fit of BLAST (arXiv 2410.21262): preconditioned gradient steps on one factor after another.

Shape letters: O out_features, I in_features, b blocks on each side, o = O / b, i = I / b, r rank, p and q blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.1  # times the root of the squared error, added to each preconditioner
START = 1e-3  # size of the random factors


def descend(weight: Tensor, blocks: int, rank: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """left (b, o, r), right (b, r, i) and couplings (b, b, r) after `steps` rounds, from noise on.

    The step length falls from 1 to 0. `weight` (O, I) is floating; all is computed in its dtype.
    """
    b, deviation = blocks, weight.std().clamp(min=torch.finfo(weight.dtype).tiny)
    target = (weight / deviation).unflatten(0, (b, -1)).unflatten(2, (b, -1)).transpose(1, 2)  # (b, b, o, i)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=weight.dtype, device="cpu").to(weight) / rank**0.5

    left, right = START * noise(b, target.shape[2], rank), START * noise(b, rank, target.shape[3])
    couplings = torch.rand(b, b, rank, generator=generator, dtype=weight.dtype, device="cpu").to(weight)
    for step in range(steps):
        length = 1 - step / steps
        read = torch.einsum("pqr,qri->prqi", couplings, right).flatten(2)  # (b, r, I)
        rows = target.transpose(1, 2).flatten(2)  # (b, o, I)
        missed = left @ read - rows
        left = left - length * _preconditioned(missed @ read.mT, read @ read.mT, missed)
        write = torch.einsum("por,pqr->qpor", left, couplings).flatten(1, 2)  # (b, O, r)
        columns = target.permute(1, 0, 2, 3).flatten(1, 2)  # (b, O, i)
        missed = write @ right - columns
        right = right - length * _preconditioned((write.mT @ missed).mT, write.mT @ write, missed).mT
        couplings = couplings - length * _coupling_steps(target, left, right, couplings)
    return left * deviation, right, couplings


def _coupling_steps(target: Tensor, left: Tensor, right: Tensor, couplings: Tensor) -> Tensor:  # (b, b, r)
    missed = torch.einsum("por,pqr,qri->pqoi", left, couplings, right) - target
    gradient = torch.einsum("por,pqoi,qri->pqr", left, missed, right)
    curvature = (left.mT @ left)[:, None] * (right @ right.mT)[None]  # (b, b, r, r)
    return _preconditioned(gradient[:, :, None], curvature, missed).squeeze(2)


def _preconditioned(gradient: Tensor, curvature: Tensor, missed: Tensor) -> Tensor:  # (..., n, r), (..., r, r)
    """gradient (curvature + damping identity)^-1."""
    damping = DAMPING * torch.linalg.vector_norm(missed) + torch.finfo(missed.dtype).tiny
    eye = torch.eye(curvature.shape[-1]).to(curvature)
    factor = torch.linalg.cholesky_ex(curvature + damping * eye).L
    return torch.cholesky_solve(gradient.mT, factor).mT
