"""Mixtures that read the same input, stored and multiplied as one.

Shape letters (this file): those of `mixt.py`, and
  S = d^(num_branches-1)     c, C core-out bond of one sibling, of all of them: Q = S c
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.kernels.mixt import mixt_siblings, part_of_cores, stack_cores
from tensormix.operators.mixt import MixT, under_autocast
from tensormix.operators.quantized import on_meta
from tensormix.operators.shared import Owner


class Siblings(Owner):
    """Several `MixT` as one product: their cores stacked along the core-out bond.

    Its parameters `core_k` (S C, P) hold those of all siblings and begin with their values.

    Args:
        names: of the parts, in the order in which their cores lie.
        parts: the mixtures; their biases stay where they are.

    Raises:
        ValueError: there are none, not one for each name, or two of them cannot be stacked; `why_apart` says why.
    """

    together = True

    def __init__(self, *, names: Sequence[str], parts: Sequence[MixT]) -> None:
        super().__init__()
        if not parts or len(names) != len(parts):
            raise ValueError(
                f"Siblings: needs one or more mixtures and a name for each, got {len(parts)}, {len(names)}"
            )
        first = parts[0]
        for operator in parts:
            reason = why_apart(first, operator)
            if reason:
                raise ValueError(f"Siblings: {reason}")
        self.bond, self.num_branches = first.bond, first.num_branches
        self.core_bonds = [operator.core_out // _outer(operator) for operator in parts]
        self.kinds = {name: on_meta(operator) for name, operator in zip(names, parts, strict=True)}  # for their sizes
        with torch.no_grad():
            stacked = stack_cores([operator.cores for operator in parts], self.bond)
        for k, core in enumerate(stacked):
            self.register_parameter(f"core_{k}", nn.Parameter(core, requires_grad=first.cores[0].requires_grad))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (kind.out_features, kind.in_features) for name, kind in self.kinds.items()}

    @property
    def sizes(self) -> dict[str, Any]:
        return {"names": list(self.kinds), "parts": [kind.spec for kind in self.kinds.values()]}

    def multiply_all(self, x: Tensor) -> dict[str, Tensor]:  # (..., I) -> (..., O) each
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Siblings: the layers take {self.in_features} features, got {x.shape[-1]}")
        x, cores = under_autocast(x, self.cores)
        rows, widths = x.reshape(-1, self.in_features), [O for O, _ in self.shapes.values()]
        outputs = mixt_siblings(rows, cores, self.bond, self.core_bonds, widths)
        return {name: y.view(*x.shape[:-1], y.shape[1]) for name, y in zip(self.kinds, outputs, strict=True)}

    def multiply(self, x: Tensor, part: str) -> Tensor:  # (..., I) -> (..., O)
        return self.kinds[part].multiply_by(self.cores_of(part), x)

    def to_dense(self, part: str) -> Tensor:  # (O, I)
        return self.kinds[part].dense_of(self.cores_of(part))

    def macs_of(self, part: str) -> int:
        return self.kinds[part].macs_per_token

    @property
    def cores(self) -> list[Tensor]:
        """The parameters core_0, core_1, ..., each (S C, P)."""
        return [getattr(self, f"core_{k}") for k in range(self.num_branches)]

    def cores_of(self, part: str) -> list[Tensor]:  # K x (S c, P)
        """The cores of one sibling, copied out of the stack; differentiable."""
        index = list(self.kinds).index(part)
        return part_of_cores(self.cores, self.bond, sum(self.core_bonds[:index]), self.core_bonds[index])


def why_apart(one: MixT, other: MixT) -> str:
    """Why two of them cannot be one product; empty if they can."""
    for operator in (one, other):
        if operator.core_out % _outer(operator):
            return (
                f"with num_branches={operator.num_branches} a {operator.in_features}x{operator.out_features} layer "
                "has no core-out bond: its branches share bonds"
            )
    for name in ("in_features", "num_branches", "bond", "core_in"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            return f"{name} is {ours} and {theirs}"
    for name in ("dtype", "device", "requires_grad"):
        ours, theirs = getattr(one.cores[0], name), getattr(other.cores[0], name)
        if ours != theirs:
            return f"{name} is {ours} and {theirs}"
    return ""


def _outer(operator: MixT) -> int:  # S
    return operator.bond ** (operator.num_branches - 1)
