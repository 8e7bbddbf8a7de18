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


class Siblings(nn.Module):
    """The outputs of several `MixT` from one product: their cores stacked along the core-out bond.

    Its parameters `core_k` (S C, P) stand for those of all siblings and begin with their values. What is saved and
    loaded are the siblings' own cores, by the `Sibling` modules; it saves nothing itself.

    Raises:
        ValueError: two of them cannot be stacked; `why_apart` says why.
    """

    bias: None = None  # those of the siblings stay with them

    def __init__(self, operators: Sequence[MixT]) -> None:
        super().__init__()
        first = operators[0]
        for operator in operators:
            reason = why_apart(first, operator)
            if reason:
                raise ValueError(f"Siblings: {reason}")
        self.in_features, self.bond, self.num_branches = first.in_features, first.bond, first.num_branches
        self.core_bonds = [operator.core_out // _outer(operator) for operator in operators]
        self.out_features = [operator.out_features for operator in operators]
        with torch.no_grad():
            stacked = stack_cores([operator.cores for operator in operators], self.bond)
        for k, core in enumerate(stacked):
            self.register_parameter(f"core_{k}", nn.Parameter(core, requires_grad=first.cores[0].requires_grad))

    def forward(self, x: Tensor) -> list[Tensor]:  # (..., I) -> each (..., O), without its bias
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Siblings: the layers take {self.in_features} features, got {x.shape[-1]}")
        x, cores = under_autocast(x, self.cores)
        rows = x.reshape(-1, self.in_features)
        outputs = mixt_siblings(rows, cores, self.bond, self.core_bonds, self.out_features)
        return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]

    @property
    def cores(self) -> list[Tensor]:
        """The parameters core_0, core_1, ..., each (S C, P)."""
        return [getattr(self, f"core_{k}") for k in range(self.num_branches)]

    def cores_of(self, index: int) -> list[Tensor]:  # K x (S c, P)
        """The cores of one sibling, copied out of the stack; differentiable."""
        return part_of_cores(self.cores, self.bond, sum(self.core_bonds[:index]), self.core_bonds[index])

    @torch.no_grad()
    def set_core(self, index: int, k: int, value: Tensor) -> None:  # (S c, P)
        """Put `value` where the stack holds core `k` of one sibling."""
        L, R = self.bond**k, self.bond ** (self.num_branches - 1 - k)
        start, size = sum(self.core_bonds[:index]), self.core_bonds[index]
        stacked = self.get_parameter(f"core_{k}").view(R, -1, L, value.shape[1])
        stacked[:, start : start + size] = value.view(R, size, L, -1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: see `Sibling`."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing: see `Sibling`."""


class Sibling(MixT):
    """One `MixT` whose cores lie in the stack of its siblings; called by itself it computes its own outputs only.

    In a state dict it is the ordinary `MixT`, both ways. The first sibling of a stack holds it as a module, and with
    it the parameters of all.
    """

    def __init__(self, operator: MixT, siblings: Siblings, index: int) -> None:
        with torch.device("meta"):
            sizes = {key: value for key, value in operator.sizes.items() if key not in ("in_features", "out_features")}
            super().__init__(operator.in_features, operator.out_features, **sizes)
        for k in range(self.num_branches):
            del self._parameters[f"core_{k}"]
        self.bias, self.weight = operator.bias, operator.weight
        self.index = index
        if index == 0:
            self.siblings = siblings
        else:
            vars(self)["siblings"] = siblings  # a module of the first one alone
        self.train(operator.training)

    @property
    def cores(self) -> list[Tensor]:
        return self.siblings.cores_of(self.index)

    @property
    def num_params(self) -> int:
        return self.num_branches * self.core_out * self.core_in

    @property
    def spec(self) -> dict[str, Any]:
        return {"operator": MixT.__name__, **self.sizes}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for k, core in enumerate(self.cores):
            destination[f"{prefix}core_{k}"] = core if keep_vars else core.detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = [f"{prefix}core_{k}" for k in range(self.num_branches)]
        rest = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for k, name in enumerate(ours):
            value = state_dict.get(name)
            if value is None:
                missing_keys.append(name)
            elif value.shape != (self.core_out, self.core_in):
                wanted = f"({self.core_out}, {self.core_in})"
                error_msgs.append(f"size mismatch for {name}: the checkpoint has {tuple(value.shape)}, not {wanted}")
            else:
                self.siblings.set_core(self.index, k, value)


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
