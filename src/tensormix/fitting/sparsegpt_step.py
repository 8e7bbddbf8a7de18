"""SparseGPT (arXiv 2301.00774): zero the weights of a layer column by column, and let the later columns make up for it.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormix.operators.sparse import GROUPED, UNSTRUCTURED, largest

BLOCK = 128  # columns that choose their entries together


def inverse_factor(gram: Tensor) -> Tensor:  # (I, I) -> (I, I)
    """Upper triangular U with U^T U = inverse(gram), in fp64, for a positive definite `gram`.

    The inverse itself is never formed: gram = R R^T with R upper triangular, which is a Cholesky factorisation in
    reversed order, and U is the inverse of R.
    """
    reversed_factor = torch.linalg.cholesky(gram.double().flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.linalg.solve_triangular(reversed_factor, identity, upper=True)


def sparsegpt(
    target: Tensor, factor: Tensor, *, num_values: int, pattern: str = UNSTRUCTURED
) -> tuple[Tensor, Tensor]:  # (O, I), (I, I) -> (O, I), (O, I)
    """A sparse S with small tr((target - S) gram (target - S)^T), and the mask of its stored entries.

    What a zeroed weight did is given to the columns after it: the optimal brain surgeon's update with the weights
    before it fixed. Of a block of 128 columns the entries with the largest w^2 / [inverse(gram)]_jj stay, where the
    inverse is that of the columns from j on; every block keeps the same share, up to one entry. A group of an N:M
    pattern chooses when its first column is reached.

    Args:
        factor: `inverse_factor` of gram.
    """
    O, I = target.shape
    work, mask = target.T.clone(), torch.zeros(I, O, dtype=torch.bool, device=target.device)  # columns are contiguous
    group = GROUPED[pattern][1] if pattern in GROUPED else BLOCK
    diagonal = factor.diagonal()[:, None]
    for start in range(0, I, BLOCK):
        stop = min(start + BLOCK, I)
        errors = torch.zeros_like(work[start:stop])
        for j in range(start, stop):
            if (j - start) % group == 0:
                here = slice(j, min(j + group, stop))
                count = num_values * here.stop // I - num_values * j // I
                if pattern in GROUPED or count > 0:
                    scores = (work[here] / diagonal[here]).abs().T
                    count = O * GROUPED[pattern][0] if pattern in GROUPED else count
                    mask[here] = largest(scores, num_values=count, pattern=pattern).T
            errors[j - start] = torch.where(mask[j], 0, work[j]) / factor[j, j]
            work[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return torch.where(mask, work, 0).T.contiguous(), mask.T.contiguous()
