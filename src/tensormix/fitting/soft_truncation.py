"""The truncation of Dobi-SVD as a differentiable function: of the matrix, and of how many singular values stay.

Shape letters: ... leading batch axes, N tokens, O out_features, K = min(N, O).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TERMS = 10  # of the expansion of 1 / (a - b)


def soft_truncation(matrix: Tensor, position: Tensor, sharpness: float) -> Tensor:  # (..., N, O), () -> (..., N, O)
    """U diag(s m) V^T for matrix = U diag(s) V^T and m_i = (1 + tanh(sharpness (position - i + 1/2))) / 2, i from 1.

    At a whole position r the first r singular values stay and the others go, up to 1 / (1 + e^sharpness): the
    published m_i with the step half way between two values. arXiv 2502.02723, Eq. 3. Differentiable in both arguments.
    """
    return _SoftTruncation.apply(matrix, position, sharpness)  # pyright: ignore[reportReturnType]


class _SoftTruncation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, position: Tensor, sharpness: float) -> Tensor:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        places = torch.arange(s.shape[-1], dtype=s.dtype, device=s.device) + 0.5
        bent = torch.tanh(sharpness * (position.to(s) - places))
        mask = (1 + bent) / 2  # (K,)
        ctx.save_for_backward(u, s, vh, mask, sharpness * (1 - bent.square()) / 2)
        ctx.dtype = position.dtype
        return (u * (s * mask)[..., None, :]) @ vh

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # (..., N, O)
        """The adjoint of X -> U g(S) V^T in the basis of U and V, g_i = s_i m_i, whose m_i do not depend on s.

        The symmetric part is multiplied by (g_i - g_j) / (s_i - s_j), the antisymmetric one by
        (g_i + g_j) / (s_i + s_j), and what lies beside U or V by m.
        """
        (grad,) = grads
        u, s, vh, mask, slope = ctx.saved_tensors
        inner = u.mT @ grad @ vh.mT  # (..., K, K)
        position = (inner.diagonal(dim1=-2, dim2=-1) * s * slope).sum().to(ctx.dtype)
        across = grad @ vh.mT - u @ inner  # (..., N, K), beside U
        along = u.mT @ grad - inner @ vh  # (..., K, O), beside V
        core = (inner + inner.mT) / 2 * _differences(s, mask) + (inner - inner.mT) / 2 * _sums(s, mask)
        return u @ core @ vh + (across * mask) @ vh + u @ (mask[:, None] * along), position, None


def _differences(s: Tensor, mask: Tensor) -> Tensor:  # (..., K), (K,) -> (..., K, K)
    """(s_i m_i - s_j m_j) / (s_i - s_j), on the diagonal m_i; bounded where singular values meet.

    For s_i >= s_j it is m_i + s_j (m_i - m_j) (s_i + s_j) / (s_i^2 - s_j^2), and with q = s_j^2 / s_i^2 the fraction
    is 1 / (1 - q) / s_i^2. Where 1 / (1 - q) exceeds `TERMS`, its expansion 1 + q + q^2 + ... is cut off after that
    many, which bounds it by them: the true derivative has a pole there, because no small change of the matrix tells
    which of two equal singular values is the one that stays.
    """
    large, small = s[..., :, None], s[..., None, :]  # only the part above the diagonal is used
    ratio = torch.where(large > 0, small / large.clamp_min(torch.finfo(s.dtype).tiny), 1).clamp_max(1)
    q = ratio.square()
    expanded = sum((q**power for power in range(TERMS)), torch.zeros_like(q))
    inverse = torch.where((1 - q) * TERMS > 1, 1 / (1 - q).clamp_min(torch.finfo(q.dtype).tiny), expanded)
    upper = mask[:, None] + ratio * (1 + ratio) * (mask[:, None] - mask[None, :]) * inverse
    upper = upper.triu(1)
    return upper + upper.mT + mask.diag()


def _sums(s: Tensor, mask: Tensor) -> Tensor:  # (..., K), (K,) -> (..., K, K)
    """(s_i m_i + s_j m_j) / (s_i + s_j); the mean of both m where both singular values are zero."""
    total = s[..., :, None] + s[..., None, :]
    kept = (s * mask)[..., :, None] + (s * mask)[..., None, :]
    mean = (mask[:, None] + mask[None, :]) / 2
    return torch.where(total > 0, kept / total.clamp_min(torch.finfo(s.dtype).tiny), mean)
