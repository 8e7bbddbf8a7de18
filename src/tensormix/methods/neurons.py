"""What the methods share that change a block's layers together: which ones depend on each other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tensormix.operators import Dense, StructuredLinear


def neuron_roles(roles: Iterable[str]) -> tuple[str, ...]:
    """The layers that put out or take in the neurons of the MLP: gate only where it has one."""
    found = set(roles)
    known = tuple(role for role in ("gate", "up", "down") if role in found)
    return () if not known else (*(("gate",) if "gate" in found else ()), "up", "down")


def check_together(method: str, roles: Iterable[str], belonging: tuple[str, ...]) -> None:
    """Raise ValueError if some of `belonging` are there and others are not."""
    there = set(roles)
    missing = [role for role in belonging if role not in there]
    if missing and len(missing) < len(belonging):
        raise ValueError(
            f"{method} changes {', '.join(belonging)} together, but {', '.join(missing)} is not among its sites "
            "(or is no longer dense); give it all of them or none"
        )


def dense(like: Tensor, matrix: Tensor) -> Dense:  # (O, I)
    """The plain operator with these numbers, in the dtype and on the device of `like`."""
    op = Dense(matrix.shape[1], matrix.shape[0]).to(like)
    with torch.no_grad():
        op.matrix.copy_(matrix)
    return op


def with_bias(operator: StructuredLinear, bias: Tensor | None) -> StructuredLinear:  # (O,)
    """The same operator, with this as the final bias of its layer."""
    if bias is not None:
        operator.bias = nn.Parameter(bias.detach().clone())
    return operator
