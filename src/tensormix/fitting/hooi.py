"""Tucker factors that several tensors share, by higher-order orthogonal iteration (HOOI).

Shape letters: D hidden size, H heads, C channels of a head, P parts, and R, S, Q the ranks of D, C, P. Every tensor is
(D, H, C, P); its heads are not compressed. All is computed in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tucker:
    """T_g ~ core_g x1 hidden x3 channels x4 parts_g, all factors with orthonormal columns.

    Attributes:
        hidden: (D, R), shared.
        channels: (C, S), shared.
        parts: (P, Q) for each tensor.
        cores: (R, H, S, Q) for each tensor: T_g projected on the factors, the best core for them.
    """

    hidden: Tensor
    channels: Tensor
    parts: list[Tensor]
    cores: list[Tensor]

    @property
    def energy(self) -> float:
        """The squared norm of what is represented; that of the tensors less it is the squared error."""
        return float(sum(core.square().sum() for core in self.cores))


def projected(tensor: Tensor, hidden: Tensor, channels: Tensor, parts: Tensor) -> Tensor:
    """(D, H, C, P) on the factors: (R, H, S, Q)."""
    smaller = torch.einsum("dr,dhcp->rhcp", hidden, tensor)
    return torch.einsum("rhcp,cs,pq->rhsq", smaller, channels, parts)


def _leading(tensors: Sequence[Tensor], mode: int, rank: int) -> Tensor:
    """The orthonormal directions of a mode that hold most of the tensors together, most first."""
    gram = sum(flat @ flat.T for flat in (tensor.movedim(mode, 0).flatten(1) for tensor in tensors))
    assert isinstance(gram, Tensor)
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]


def full_hosvd(tensors: Sequence[Tensor]) -> Tucker:
    """The tensors in the bases of all their modes, sorted by energy: nothing is lost, and cutting it is the start."""
    tensors = [tensor.double() for tensor in tensors]
    hidden, channels = (_leading(tensors, mode, tensors[0].shape[mode]) for mode in (0, 2))
    parts = [_leading([tensor], 3, tensor.shape[3]) for tensor in tensors]
    cores = [projected(t, hidden, channels, part) for t, part in zip(tensors, parts, strict=True)]
    return Tucker(hidden, channels, parts, cores)


def hooi(whole: Tucker, ranks: tuple[int, int, int], steps: int, tolerance: float) -> Tucker:
    """The factors of ranks (R, S, Q) that hold most of what `full_hosvd` found: each in turn the best for the others.

    No step holds less than the one before, so that it is never worse than the cut start, whose squared error is at most
    the sum of what each mode leaves out. It ends after `steps` (0 gives the cut start), or when a step gains less than
    `tolerance` of all.
    """
    R, S, Q = ranks
    # What is left of the work is done among the leading coordinates, and turned back at the end.
    tensors = whole.cores
    hidden = torch.eye(len(whole.hidden), dtype=torch.float64, device=whole.hidden.device)[:, :R]
    hidden, channels = (
        torch.eye(n, dtype=torch.float64)[:, :k] for n, k in ((len(whole.hidden), R), (len(whole.channels), S))
    )
    parts = [torch.eye(len(part), dtype=torch.float64)[:, :Q] for part in whole.parts]
    total, before = whole.energy, -1.0
    for _ in range(steps):
        hidden = _leading(
            [torch.einsum("dhcp,cs,pq->dhsq", t, channels, part) for t, part in zip(tensors, parts, strict=True)], 0, R
        )
        smaller = [torch.einsum("dr,dhcp->rhcp", hidden, t) for t in tensors]
        channels = _leading([t @ part for t, part in zip(smaller, parts, strict=True)], 2, S)
        narrow = [torch.einsum("rhcp,cs->rhsp", t, channels) for t in smaller]
        parts = [_leading([t], 3, Q) for t in narrow]
        held = float(sum((t @ part).square().sum() for t, part in zip(narrow, parts, strict=True)))
        if held - before <= tolerance * total:
            break
        before = held
    cores = [projected(t, hidden, channels, part) for t, part in zip(tensors, parts, strict=True)]
    turned = [old @ new for old, new in zip(whole.parts, parts, strict=True)]
    return Tucker(whole.hidden @ hidden, whole.channels @ channels, turned, cores)


def held_by(whole: Tucker, number: int) -> Tensor:  # (D, C)
    """The energy that the cut start holds with this many parts, for all ranks (R, S)."""
    kept = [core[..., :number].square().sum((1, 3)) for core in whole.cores]
    return torch.stack(kept).sum(0).cumsum(0).cumsum(1)
