"""All numbers of an operator fitted together, where no closed form is known.

Shape letters: I in_features, O out_features, K directions of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormix.operators.base import StructuredLinear


def fit_jointly(op: StructuredLinear, weight: Tensor, root: Tensor | None, *, steps: int) -> tuple[int, float]:
    """Lower ||(weight - W) root||_F over all parameters of `op`, in place, from where they are; never raises it.

    L-BFGS with a line search on the dense form of W, in the dtype of `weight`: every step writes W out and multiplies
    it by `root`, so a step costs some products of the size of the layer.

    Args:
        weight: (O, I), of the dtype of `op`.
        root: (I, K); None is the identity.
        steps: at most.

    Returns:
        How often the error was computed, and ||(weight - W) root||_F / ||weight root||_F at the end (0 / 0 is 0).
    """
    parameters = [p for p in op.parameters() if p is not op.bias]
    wanted = weight if root is None else weight @ root  # (O, K)
    scale = float(torch.linalg.vector_norm(wanted)) or 1.0
    calls = 0
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0.0,
        tolerance_change=1e-9,
    )  # fmt: skip

    def error() -> Tensor:
        dense = op.to_dense()
        return ((wanted - (dense if root is None else dense @ root)) / scale).square().sum()

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimiser.zero_grad()
        loss = error()
        loss.backward()
        return loss

    with torch.no_grad():
        start, before = [p.clone() for p in parameters], float(error())
    with torch.enable_grad():
        optimiser.step(closure)
    with torch.no_grad():
        after = float(error())
        if not after <= before:  # also NaN
            after = before
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    for parameter in parameters:
        parameter.grad = None
    return calls, after**0.5
