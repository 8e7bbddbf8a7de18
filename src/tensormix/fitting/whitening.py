"""The best low rank on data: what the methods with whitened weights share.

For S with S S^T = X X^T the error on the data is ||(W - W') X||_F = ||(W - W') S||_F, so that the left singular vectors
of W S answer everything: W' = U U^T W is the optimum, and no square root is ever inverted.
Shape letters: I in_features, O out_features, R rank, K directions of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormix.operators import LowRank
from tensormix.operators.base import computing_dtype


def gram_root(gram: Tensor, ridge: float = 0.0) -> Tensor:  # (I, I) -> (I, K)
    """S with S S^T = gram + ridge * (mean eigenvalue of gram) * identity, from the eigendecomposition.

    A Gram matrix without full rank is welcome: eigenvalues below the rounding of the largest are left out.

    Raises:
        ValueError: `gram` is zero or not finite.
    """
    check_inputs(gram)
    values, vectors = torch.linalg.eigh(gram)
    values = values + ridge * gram.diagonal().mean()
    kept = values > _rounding(gram) * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def gram_factor(gram: Tensor, ridge: float = 0.0) -> tuple[Tensor, float]:  # (I, I) -> (I, I)
    """Triangular S with S S^T = gram + (ridge * mean eigenvalue of gram + noise^2) * identity, by Cholesky, and noise.

    Many times faster than the eigenvectors of `gram_root`. The square of the noise is the rounding of `gram` itself, so
    that nothing is hidden that it says. A matrix that is further from positive gets `gram_root`, and no noise.

    Raises:
        ValueError: `gram` is zero or not finite.
    """
    check_inputs(gram)
    rounding = _rounding(gram) * torch.linalg.matrix_norm(gram)
    shifted = gram.clone()
    shifted.diagonal().add_(ridge * gram.diagonal().mean() + rounding)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return (gram_root(gram, ridge), 0.0) if failed else (factor, float(rounding) ** 0.5)


def factor_root(factor: Tensor, ridge: float = 0.0) -> Tensor:  # (K, I) -> (I, K)
    """The same from R with R^T R = gram, without forming a Gram matrix: the ridge becomes rows below R.

    Raises:
        ValueError: `factor` is zero or not finite.
    """
    check_inputs(factor)
    if ridge == 0:
        return factor.T
    rows = torch.eye(factor.shape[1]).to(factor) * (ridge * factor.square().sum() / factor.shape[1]).sqrt()
    return torch.linalg.qr(torch.cat([factor, rows]), mode="r").R.T


def widened(weight: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:  # (O, I), (I, K)
    """Both on the device of the weight, in the wider dtype of what a fit and the statistic are computed in.

    Raises:
        ValueError: `weight` is not finite.
    """
    dtype = torch.promote_types(computing_dtype(weight), root.dtype)
    wide = weight.detach().to(dtype)
    if not wide.isfinite().all():
        raise ValueError("the weight holds NaN or infinite values")
    return wide, root.to(wide)


def output_basis(weight: Tensor, root: Tensor, rank: int, noise: float = 0.0) -> Tensor:  # (O, I), (I, K) -> (O, R)
    """Orthonormal U for which W' = U U^T W of this rank has the smallest ||(W - W') root||_F.

    Inputs that span few directions leave a choice; of all optima this is the one with the smallest ||W - W'||_F: U
    begins with what the inputs reach, and the ranks that are left go to the truncated SVD of what W has beside it.
    Directions of `root` that are not longer than about `noise` count as not reached.
    """
    product = weight @ root
    if product.shape[1] > product.shape[0]:  # the right singular vectors are of no use here, so they are never made
        product = torch.linalg.qr(product.T, mode="r").R.T
    u, s, _ = torch.linalg.svd(product, full_matrices=False)
    unsure = weight.norm() * max(2 * noise, torch.finfo(s.dtype).eps * float(root.norm()))  # the noise, or rounding
    num_reached = int((s > unsure).sum())
    basis = u[:, : min(rank, num_reached)]
    if basis.shape[1] == rank:
        return basis
    beside = torch.linalg.svd(weight - basis @ (basis.T @ weight), full_matrices=False).U
    # QR, because singular vectors of what rounding left of a zero remainder are not orthogonal to the basis
    return torch.linalg.qr(torch.cat([basis, beside[:, : rank - basis.shape[1]]], dim=1)).Q


def refit_left(weight: Tensor, left: Tensor, right: Tensor, root: Tensor) -> Tensor:  # (O, I), (O, R), (R, I), (I, K)
    """The left factor with the smallest ||(W - left right) root||_F; among several, the one nearest to `left`.

    Rounding the Gram matrix at eps times its norm moves singular values of right @ root that are smaller than the root
    of that; what they belong to counts as not seen.
    """
    seen = right @ root  # (R, K)
    unsure = _rounding(root) ** 0.5 * torch.linalg.matrix_norm(right, 2) * torch.linalg.matrix_norm(root, 2)
    missing = weight @ root - left @ seen
    return left + missing @ torch.linalg.pinv(seen, atol=unsure)


def refitted(weight: Tensor, gram: Tensor, chosen: Tensor) -> Tensor:  # (O, I), (I, I), (R,) -> (O, R)
    """The matrix that makes most of the chosen inputs: the least squares of W x by x[chosen].

    Where several are equally good, the one nearest to W[:, chosen].
    """
    check_inputs(gram)
    wide, seen = widened(weight, gram)
    missing = wide @ seen[:, chosen] - wide[:, chosen] @ seen[chosen][:, chosen]  # (O, R)
    step = solved(seen[chosen][:, chosen], missing)
    if step is not None:
        return wide[:, chosen] + step
    pick = torch.eye(weight.shape[1]).to(wide)[chosen]  # (R, I)
    return refit_left(wide, wide[:, chosen], pick, gram_root(gram).to(wide))


def solved(gram: Tensor, product: Tensor) -> Tensor | None:  # (R, R), (O, R) -> (O, R)
    """X with X gram = product, by Cholesky: many times faster than a pseudo-inverse.

    None if that would not be exact: some direction, measured in the lengths of the columns, is hardly there.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    if not bool((lengths > 0).all()):
        return None
    unit = gram / lengths / lengths[:, None]
    # Cholesky of what is left without the shift proves that every eigenvalue is larger than it.
    shift = _rounding(gram) ** 0.6
    shifted = unit - shift * torch.eye(len(unit)).to(unit)
    if torch.linalg.cholesky_ex(shifted).info:
        return None
    factor = torch.linalg.cholesky_ex(unit).L
    return torch.cholesky_solve((product / lengths).T, factor).T / lengths


def low_rank(weight: Tensor, left: Tensor, right: Tensor) -> LowRank:  # (O, I), (O, R), (R, I)
    """The operator with these factors, in the dtype and on the device of `weight`."""
    op = LowRank(weight.shape[1], weight.shape[0], rank=left.shape[1]).to(weight)
    with torch.no_grad():
        op.left.copy_(left)
        op.right.copy_(right)
    return op


def best_on_inputs(weight: Tensor, root: Tensor, rank: int) -> LowRank:  # (O, I), (I, K)
    """The operator of this rank with the smallest ||(W - W') root||_F; each column is as long as its row."""
    wide, root = widened(weight, root)
    left = output_basis(wide, root, rank)
    return balanced(weight, left, left.T @ wide)


def balanced(weight: Tensor, left: Tensor, right: Tensor) -> LowRank:  # (O, I), (O, R), (R, I)
    """The operator with these factors, each column of the left one made as long as its row of the right one."""
    scale = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1)
    return low_rank(weight, left * scale, right / scale[:, None])


def whitened_spectrum(weight: Tensor, root: Tensor) -> Tensor:  # (O, I), (I, K) -> (min(O, K),)
    """The singular values of weight root, from the largest on: the squares beyond rank R sum to the error of rank R.

    From the smaller product with its transpose in fp64: that is exact to the rounding of the largest square.
    """
    wide, root = widened(weight, root)
    core = (wide @ root).double()
    product = core @ core.T if core.shape[0] <= core.shape[1] else core.T @ core
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().flip(0)


def _rounding(matrix: Tensor) -> float:
    """What rounding does to the spectrum of such a matrix, as a fraction of its largest value: eps sqrt(size)."""
    return torch.finfo(matrix.dtype).eps * max(matrix.shape) ** 0.5


def check_inputs(measured: Tensor) -> None:
    """Raise ValueError if a statistic is zero or not finite."""
    if not measured.isfinite().all():
        raise ValueError("the calibration inputs hold NaN or infinite values")
    if not measured.any():
        raise ValueError(
            "the calibration inputs are all zero, so they do not say which directions matter; use svd or zero here"
        )
