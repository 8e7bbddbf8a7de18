"""Mixtures of the same input as one: their cores lie beside each other along the core-out bond.

The outputs of a mixture are (S, c, S) with S = d^(K-1) values of the outer bonds on each side and c of the core bond;
branch k sees the same as (L, [R, c, L], R). Mixtures that agree on K, d and P therefore become one with C = the sum of
their c, whose outputs are cut apart along C.

Letters of this file beside the folder's: S d^(K-1)     c, C core-out bond of one, of all: Q = S c
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from tensormix.kernels.mixt.reference import mixt, windows

MOST = 2**21  # outputs up to which one product wins on a CPU: cutting more apart takes longer than cutting the cores

Mixture = Callable[[Tensor, Sequence[Tensor], int, int], Tensor]


def stack_cores(siblings: Sequence[Sequence[Tensor]], bond: int) -> list[Tensor]:  # of each K x (Q, P) -> K x (S C, P)
    """The cores of the one mixture; differentiable."""
    num_branches, P = len(siblings[0]), siblings[0][0].shape[1]
    return [
        torch.cat([cores[k].view(R, -1, L, P) for cores in siblings], dim=1).view(-1, P)
        for k, (L, R) in enumerate(windows(num_branches, bond))
    ]


def part_of_cores(cores: Sequence[Tensor], bond: int, start: int, size: int) -> list[Tensor]:  # K x (S C, P)
    """The cores, K x (S c, P), of the sibling whose core bond is C[start : start + size]; differentiable."""
    P = cores[0].shape[1]
    return [
        core.view(R, -1, L, P)[:, start : start + size].reshape(-1, P)
        for core, (L, R) in zip(cores, windows(len(cores), bond), strict=True)
    ]


def mixt_siblings(
    x: Tensor,  # (N, I)
    cores: Sequence[Tensor],  # K x (S C, P)
    bond: int,
    core_bonds: Sequence[int],
    out_features: Sequence[int],
    mixture: Mixture,
    most: int,
) -> list[Tensor]:  # each (N, O)
    """The outputs of all siblings: up to `most` numbers by one call of `mixture`, more by one for each of them."""
    S = bond ** (len(cores) - 1)
    width = S * sum(core_bonds) * S
    if len(x) * width > most:
        return _one_by_one(mixture, x, cores, bond, core_bonds, out_features)
    outputs = [x.new_empty(len(x), O) for O in out_features]
    _cut_apart(mixture(x, cores, bond, width), S, core_bonds, outputs)
    return outputs


def _one_by_one(
    mixture: Mixture,
    x: Tensor,
    cores: Sequence[Tensor],
    bond: int,
    core_bonds: Sequence[int],
    out_features: Sequence[int],
) -> list[Tensor]:
    starts = accumulate(core_bonds, initial=0)
    return [
        mixture(x, part_of_cores(cores, bond, start, size), bond, O)
        for start, size, O in zip(starts, core_bonds, out_features, strict=False)
    ]


def _cut_apart(whole: Tensor, S: int, core_bonds: Sequence[int], targets: Sequence[Tensor]) -> None:
    """Write the outputs `whole` (N, S C S) into those of the siblings, each (N, O)."""
    pieces = whole.unflatten(1, (S, -1, S)).split(list(core_bonds), dim=2)
    for target, piece in zip(targets, pieces, strict=True):
        if target.shape[1] == S * piece.shape[2] * S:
            target.unflatten(1, (S, -1, S)).copy_(piece)
        else:
            target.copy_(piece.flatten(1)[:, : target.shape[1]])


def reference_siblings(
    x: Tensor, cores: Sequence[Tensor], bond: int, core_bonds: Sequence[int], out_features: Sequence[int]
) -> list[Tensor]:  # (N, I), K x (S C, P) -> each (N, O)
    """The same, each mixture by itself: any device, any dtype, differentiable."""
    return _one_by_one(mixt, x, cores, bond, core_bonds, out_features)


def put_together(
    parts: Sequence[Tensor], S: int, core_bonds: Sequence[int]
) -> Tensor:  # each (N, O) -> (N, S C S): the adjoint of cutting the outputs apart and cropping them
    sizes = [S * size * S for size in core_bonds]
    padded = [F.pad(part, (0, size - part.shape[1])) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat([part.unflatten(1, (S, -1, S)) for part in padded], dim=2).flatten(1)
