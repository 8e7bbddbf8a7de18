"""What the methods share that fit all numbers of an operator together to the outputs on calibration inputs.

Shape letters: I in_features, O out_features, K directions of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormix.fitting.whitening import gram_root
from tensormix.operators import StructuredLinear
from tensormix.operators.joint_fit import fit_jointly

Facts = dict[str, Any]


def whitened(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:  # (O, I), (I, I) -> (O, I), (I, K)
    """The weight and the root of the Gram matrix, in fp64: a line search sees differences of small errors.

    Raises:
        ValueError: `gram` is zero or not finite.
    """
    wide = weight.detach().double()
    return wide, gram_root(gram.double()).to(wide)


def fit_whitened(op: StructuredLinear, weight: Tensor, root: Tensor, *, steps: int) -> Facts:  # (O, I), (I, K)
    """`fit_jointly` from where `op` is; what a row says about it."""
    calls, error = fit_jointly(op, weight, root, steps=steps)
    seen = bool(torch.linalg.vector_norm(weight @ root) > 0)
    return {"fit_steps": calls, "fit_precision": "float64", "output_error": error if seen else None}
