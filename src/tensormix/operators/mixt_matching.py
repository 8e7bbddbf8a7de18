"""The tensor mixture nearest to a dense weight: an exact least-squares fit that never builds a Kronecker product.

Shape letters (this file): as in `mixt`, I', O' padded sizes, P, Q core input / output size, L, R passed-through sizes.

Write core_k = num_branches * c_k, so that W' = sum_k E_k(c_k) with E_k(c) = I_L ⊗ c ⊗ I_R. The entries of W' that E_k
writes are a strided view (`window`), so E_k is "add c to the view" and its adjoint is "sum over the view": the partial
trace over the passed-through bonds. On every bond the projection E_k E_k^T / (L R) is either the identity or the trace,
so the projections of all branches commute and one deflation sweep over them reaches the optimum (`_sweep`).

Padded rows and columns are free, because their outputs are cropped and their inputs are zero. The projections then no
longer commute, and conjugate gradients on the cropped residual finish what the sweep began (`_fit_cropped`).

Memory: the weight, one buffer of the padded size in the computing dtype, and one set of cores (four with padding).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensormix.operators.base import computing_dtype

Windows = Sequence[tuple[int, int]]  # (L, R) of each branch

MAX_STEPS = 200  # conjugate-gradient steps; a bound for safety, 10 to 40 are taken


def window(weight: Tensor, left: int, right: int) -> Tensor:  # (O', I') -> (Q, P, L, R)
    """The entries W[(a,o,b), (a,i,b)] that a branch with these passed-through sizes writes, as a view [o, i, a, b]."""
    O, I = weight.shape
    passed = left * right
    bonds = weight.view(left, O // passed, right, left, I // passed, right)
    return bonds.diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3)


def match(weight: Tensor, windows: Windows, core_shape: tuple[int, int]) -> Tensor:  # (O, I) -> (num_branches, Q, P)
    """The cores that minimise ||weight - W||_F, W the mixture cropped to (O, I).

    Computed in at least fp32. Without padding the result is exact up to rounding. With padding the conjugate gradients
    stop when the norm of the gradient has fallen to 16 machine epsilons of what it is at W = 0, or after `MAX_STEPS`
    steps.
    """
    shape = (weight.shape[0], weight.shape[1])
    passed = windows[0][0] * windows[0][1]
    padded = (core_shape[0] * passed, core_shape[1] * passed)
    buffer = torch.zeros(padded, dtype=computing_dtype(weight), device=weight.device)
    buffer[: shape[0], : shape[1]] = weight
    parts = _sweep(buffer, windows) if padded == shape else _fit_cropped(buffer, windows, shape)
    return parts.mul_(len(windows))


def _sweep(residual: Tensor, windows: Windows) -> Tensor:  # (O', I') -> (num_branches, Q, P)
    """Deflation: each branch takes its projection out of what the earlier ones left of `residual`, in place."""
    passed = windows[0][0] * windows[0][1]
    parts = residual.new_empty(len(windows), residual.shape[0] // passed, residual.shape[1] // passed)
    for part, (left, right) in zip(parts, windows, strict=True):
        view = window(residual, left, right)
        torch.mean(view, (-2, -1), out=part)
        view -= part[..., None, None]
    return parts


def _fit_cropped(buffer: Tensor, windows: Windows, shape: tuple[int, int]) -> Tensor:  # (O', I')
    """Conjugate gradients for the cropped problem, from where the sweep over the zero-filled weight ends.

    `buffer` holds the zero-filled weight and is used up. The normal equations are singular, since the branches share
    directions, but consistent: conjugate gradients from any start reach a solution, and all solutions give the same W.
    """
    passed = windows[0][0] * windows[0][1]
    gradient = buffer.new_empty(len(windows), buffer.shape[0] // passed, buffer.shape[1] // passed)
    image = torch.empty_like(gradient)
    start = _norm(gather(gradient, buffer, windows))
    parts = _sweep(buffer, windows)
    size = _norm(gather(gradient, _crop(buffer, shape), windows))
    direction = gradient.clone()
    for _ in range(MAX_STEPS):
        if size <= 16 * torch.finfo(buffer.dtype).eps * start:
            break
        scatter(buffer, direction, windows)
        gather(image, _crop(buffer, shape), windows)
        step = size**2 / float(torch.dot(direction.flatten(), image.flatten()))
        parts.add_(direction, alpha=step)
        gradient.sub_(image, alpha=step)
        previous, size = size, _norm(gradient)
        direction.mul_((size / previous) ** 2).add_(gradient)
    return parts


def scatter(buffer: Tensor, parts: Tensor, windows: Windows) -> None:  # (O', I'), (num_branches, Q, P)
    """buffer <- sum_k E_k(parts_k). Entries outside all windows are neither read nor written."""
    for left, right in windows:
        window(buffer, left, right).zero_()
    for part, (left, right) in zip(parts, windows, strict=True):
        view = window(buffer, left, right)
        view += part[..., None, None]


def gather(parts: Tensor, buffer: Tensor, windows: Windows) -> Tensor:  # (num_branches, Q, P), (O', I')
    """parts_k <- E_k^T(buffer): the adjoint of `scatter`."""
    for part, (left, right) in zip(parts, windows, strict=True):
        torch.sum(window(buffer, left, right), (-2, -1), out=part)
    return parts


def _crop(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zero what lies outside `shape`, in place."""
    buffer[shape[0] :] = 0
    buffer[:, shape[1] :] = 0
    return buffer


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
