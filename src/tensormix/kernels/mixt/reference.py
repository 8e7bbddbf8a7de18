"""What the kernels compute, in plain PyTorch: any device, any dtype, differentiable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def windows(num_branches: int, bond: int) -> Iterator[tuple[int, int]]:
    """(L, R) of every branch: how many values it passes through on the left and on the right."""
    for k in range(num_branches):
        yield bond**k, bond ** (num_branches - 1 - k)


def mixt(x: Tensor, cores: Sequence[Tensor], bond: int, out_features: int) -> Tensor:  # (N, I), K x (Q, P) -> (N, O)
    """y = x @ W.T with W = 1/K sum_k I_L ⊗ core_k ⊗ I_R cropped to (O, I): arXiv 2605.25344, Eq. 1."""
    Q, P = cores[0].shape
    passed = bond ** (len(cores) - 1)
    rows = F.pad(x, (0, P * passed - x.shape[1]))
    y = x.new_zeros(x.shape[0], Q * passed)
    for core, (L, R) in zip(cores, windows(len(cores), bond), strict=True):
        y = y + torch.einsum("nlpr,qp->nlqr", rows.view(-1, L, P, R), core).reshape(y.shape)
    return y[:, :out_features] / len(cores)


def mixt_cores(
    dy: Tensor, x: Tensor, core_sizes: Sequence[int], num_branches: int, bond: int
) -> Tensor:  # (N, O), (N, I), (Q, P) -> (K, Q, P)
    """The gradients of all cores: the partial traces of dy.T @ x over what each branch passes through, divided by K."""
    Q, P = core_sizes
    passed = bond ** (num_branches - 1)
    dy, x = F.pad(dy, (0, Q * passed - dy.shape[1])), F.pad(x, (0, P * passed - x.shape[1]))
    traces = [
        torch.einsum("nlqr,nlpr->qp", dy.view(-1, L, Q, R), x.view(-1, L, P, R)) for L, R in windows(num_branches, bond)
    ]
    return torch.stack(traces) / num_branches
