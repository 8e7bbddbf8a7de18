"""A Gram matrix as a Kronecker product over the factors of the inputs: a scale that a tensor train can undo.

A train of W S with S = S_1 ⊗ ... ⊗ S_K becomes one of W, bond for bond, when each core is multiplied by its own inverse
of S_k; with any other S the bonds would grow. So the inputs are weighed by the product that their Gram matrix is
nearest to in its marginals, and exactly where it is one.
Shape letters: I in_features, O out_features, i factor of the inputs, a, b bonds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_RIDGE = 1e-3  # of the mean eigenvalue of each factor: a direction that no input has stays in reach


def mode_scales(gram: Tensor, in_modes: Sequence[int]) -> list[Tensor]:  # (I, I) -> (i, i) each
    """Triangular S_k with S_k S_k^T the partial trace of `gram` over all other factors, of mean eigenvalue 1."""
    scales = []
    for k, i in enumerate(in_modes):
        before, after = prod(in_modes[:k]), prod(in_modes[k + 1 :])
        cut = gram.view(before, i, after, before, i, after)
        marginal = torch.einsum("piqpjq->ij", cut)
        marginal = marginal / marginal.diagonal().mean() + _RIDGE * torch.eye(i).to(gram)
        scales.append(torch.linalg.cholesky(marginal))
    return scales


def scaled(weight: Tensor, scales: Sequence[Tensor]) -> Tensor:  # (O, I), (i, i) each -> (O, I)
    """W (S_1 ⊗ ... ⊗ S_K)."""
    shape = weight.shape
    for k, scale in enumerate(scales):
        before = shape[0] * prod(len(other) for other in scales[:k])
        weight = torch.einsum("piq,ij->pjq", weight.reshape(before, len(scale), -1), scale)
    return weight.reshape(shape)


def unscaled(cores: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:  # (a, o, i, b) each
    """The cores of W from those of W (S_1 ⊗ ... ⊗ S_K)."""
    return [
        torch.linalg.solve_triangular(scale.T, core.movedim(2, 0).flatten(1), upper=True)
        .unflatten(1, (core.shape[0], core.shape[1], core.shape[3]))
        .movedim(0, 2)
        for core, scale in zip(cores, scales, strict=True)
    ]
