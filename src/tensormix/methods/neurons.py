"""What the methods share that change a block's layers together: which ones depend on each other, and their biases.

Shape letters: O out_features, G heads of keys and values, C channels of a head, R channels that stay, F neurons, N
neurons that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tensormix.methods.base import Layer
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
            "(or is no longer dense); give it all of them or none: svd_llm takes each alone"
        )


def check_parts(method: str, roles: Iterable[str]) -> None:
    """Raise ValueError if a part of the block is there by halves: its heads of values, or its neurons."""
    check_together(method, roles, ("v", "o"))
    check_together(method, roles, neuron_roles(roles))


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


def unchanged(layers: Mapping[str, Layer]) -> dict[str, StructuredLinear]:
    """The same layers as operators."""
    return {role: with_bias(dense(layer.weight, layer.weight), layer.bias) for role, layer in layers.items()}


def value_bias(bias: Tensor | None, maps: Tensor) -> Tensor | None:  # (G C,), (G, R, C) -> (G C,)
    """What the maps make of the bias of v, at the first channels of each head; the channels that go have none."""
    if bias is None:
        return None
    G, R, C = maps.shape
    made = bias.new_zeros(G, C)
    made[:, :R] = (maps @ bias.to(maps).view(G, C, 1)).squeeze(-1)
    return made.flatten()


def neuron_bias(bias: Tensor | None, chosen: Tensor) -> Tensor | None:  # (F,), (N,) -> (F,)
    """The bias of the neurons that stay, which are the first afterwards; those that go have none."""
    return None if bias is None else torch.cat([bias[chosen], bias.new_zeros(len(bias) - len(chosen))])
