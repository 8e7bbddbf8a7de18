"""The error of a layer's outputs as a quadratic form in the error of its weight.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(error: Tensor, gram: Tensor) -> float:  # (O, I), (I, I)
    """tr(E gram E^T): for gram = X X^T the sum over tokens of ||E x||^2."""
    return float(torch.sum(error @ gram * error))


def damped(gram: Tensor, damping: float, relative_damping: float) -> Tensor:  # (I, I) -> (I, I)
    """A positive definite copy: `damping` times the mean of the diagonal is added to it, and `relative_damping` times
    itself.

    A feature that is always zero gets the first alone, whatever the units of the inputs; HASSLE-free writes a 1 there.

    Raises:
        ValueError: `gram` is zero or not finite.
    """
    if not gram.isfinite().all():
        raise ValueError("the calibration inputs hold NaN or infinite values")
    if not gram.any():
        raise ValueError(
            "the calibration inputs are all zero, so they do not say which weights matter; use svd or zero here"
        )
    result = gram.double()
    mean = result.diagonal().mean()
    return result + torch.diag(relative_damping * result.diagonal() + damping * mean)
