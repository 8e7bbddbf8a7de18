"""The low rank that is best on data, in closed form and without a singular value decomposition.

Shape letters: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_step(target: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # (O, I), (I, I) -> (O, R), (R, I)
    """left, right with the smallest tr((target - left right) gram (target - left right)^T), gram = root root^T.

    left holds the leading left singular vectors of target root, right = left^T target: the closed form of 3BASiL
    (arXiv 2603.01376) without its inverse of root, which need not exist. The vectors come from the smaller product of
    target root with its transpose, in fp64 because it squares the condition number; they are several times faster to
    have than by a singular value decomposition. The error is the sum of the eigenvalues that are left out.
    """
    core = (target @ root).double()
    O, K = core.shape
    if O <= K:
        left = torch.linalg.eigh(core @ core.T).eigenvectors[:, -rank:].flip(1)
    else:
        inner = torch.linalg.eigh(core.T @ core).eigenvectors[:, -rank:].flip(1)
        left = torch.linalg.qr(core @ inner).Q  # orthonormal even where singular values are zero
    left = left.to(target)
    return left, left.T @ target
