"""How large a learning rate may be, told from the gradients before the first step.

Adam moves every parameter by about the rate in its first steps, whatever the size of its gradient. To first order such
a step lowers the loss by the rate times the sum of all absolute gradients. A step that promises more than the loss that
there is cannot keep its promise: it leaves the region where the gradient means anything, and what a compressed model
still knew is lost. In large models a few matrices (those that write massive activations) hold nearly all of the
gradient, so a rate that suits a small model promises several times the whole loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

PROMISE = 0.5  # of the loss, at the largest rate that is taken by itself (studies/recovery)
NUM_BATCHES = 4  # that are looked at


def loss_per_rate(factors: Mapping[nn.Parameter, float], losses: Iterable[Tensor]) -> float:
    """The rate at which a first step would promise to bring the loss to 0; infinite where nothing can be learned.

    Args:
        factors: of every trained parameter what its rate is multiplied with.
        losses: of some batches, each with a graph; gradients are left as they were found, at None.
    """
    loss_sum = promised = 0.0
    for loss in losses:
        loss.backward()
        loss_sum += float(loss.detach())
        for parameter, factor in factors.items():
            if parameter.grad is not None:
                promised += factor * float(parameter.grad.abs().sum(dtype=torch.float32))
                parameter.grad = None
    return max(0.0, loss_sum) / promised if promised > 0 else float("inf")


def largest_rate(per_rate: float, otherwise: float) -> float:
    """The rate that promises `PROMISE` of the loss, 0 where no loss is left; `otherwise` where any rate would do."""
    return PROMISE * per_rate if per_rate < float("inf") else otherwise


def warning(rate: float, per_rate: float) -> str | None:
    """What a user must know of a rate that promises more than the whole loss; None of a smaller one."""
    if rate <= per_rate or per_rate == 0:
        return None
    return (
        f"learning_rate {rate:.2g} is high: the first step promises to lower the loss by {rate / per_rate:.2g} times "
        f"what there is, so it may do harm; learning_rate: auto takes {PROMISE * per_rate:.2g}"
    )
