"""Siblings in one call, for as long as it is wanted: q, k and v of a block read the same input, and so do gate, up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.inference.faster import milliseconds
from tensormix.operators import MixT, Sibling, Siblings, StructuredLinear, why_apart
from tensormix.rows import Row
from tensormix.sites import FUSED, role_of

Layers = dict[str, nn.Module]  # name in the parent -> layer


@contextmanager
def fuse_siblings(model: nn.Module, *, num_tokens: int | None = None, repeats: int = 15) -> Iterator[list[Row]]:
    """Inside, the MixT layers q, k and v of a block, or gate and up, are one product that reads x once.

    Layers become one if they agree on inputs, `num_branches`, `bond` and padding, on dtype and device, and on whether
    they are trained. With `num_tokens` only those do that are faster so at this many tokens: both forms are timed
    first, on this machine, in turns.

    Nothing is stored twice. Inside, the cores of siblings are one parameter (make an optimizer inside too), and
    `state_dict`, `load_state_dict` and `save_pretrained` write and read the ordinary checkpoint. On leaving, the
    layers are as they were, with the values that were trained or loaded inside.

    The first sibling that the forward of their parent calls computes all; the others get their part if they are
    called with the very same tensor in the same call. Nothing is kept from one call to the next.

    Yields:
        One row per group: module (the parent), siblings (their names in it), chosen ("together" or "separate"), why
        (they are separate), and with `num_tokens` tokens, separate_ms and together_ms (medians of `repeats`). A parent
        has rows if one of its q, k, v, gate or up is structured.

    Raises:
        ValueError: `num_tokens` or `repeats` is less than 1.
    """
    for name, value in (("num_tokens", num_tokens), ("repeats", repeats)):
        if value is not None and value < 1:
            raise ValueError(f"fuse_siblings: {name} must be at least 1, got {value}")
    known: dict[str, tuple[float, float]] = {}  # one measurement for all groups of a kind
    fused: list[tuple[nn.Module, dict[str, MixT], Siblings]] = []
    rows: list[Row] = []
    try:
        for path, parent, layers in _families(model):
            groups, rest = _groups(parent, layers)
            rows += [{"module": path, "siblings": [n], "chosen": "separate", "why": why} for n, why in rest.items()]
            for group in groups:
                row: Row = {"module": path, "siblings": list(group), "chosen": "together", "why": ""}
                siblings = Siblings(list(group.values()))
                if num_tokens is not None:
                    row |= _timed(group, siblings, num_tokens, repeats, known)
                rows.append(row)
                if row["chosen"] == "together":
                    fused.append((parent, group, siblings))
                    _fuse(parent, group, siblings)
        yield rows
    finally:
        for parent, group, siblings in fused:
            _part(parent, group, siblings)


def _families(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layers]]:
    """Every parent of two or more of q, k, v, or of gate and up, one of them structured: its path, it, the layers."""
    for path, parent in list(model.named_modules()):
        roles = {role_of(f"{path}.{name}"): name for name, _ in parent.named_children()}
        for family in FUSED.values():
            layers = {roles[role]: parent.get_submodule(roles[role]) for role in family if role in roles}
            if len(layers) > 1 and any(isinstance(layer, StructuredLinear) for layer in layers.values()):
                yield path, parent, layers


def _groups(parent: nn.Module, layers: Layers) -> tuple[list[dict[str, MixT]], dict[str, str]]:
    """The groups of two or more that can be one product, and why each other layer is in none."""
    groups: list[dict[str, MixT]] = []
    alone: dict[str, str] = {}
    for name, layer in layers.items():
        if type(layer) is not MixT:
            alone[name] = f"it is a {type(layer).__name__}, and only MixT layers become one product"
        elif is_watched(layer) or "forward" in vars(layer) or not isinstance(_forward(parent), _Sharing | None):
            alone[name] = "hooks or a forward of its own, or of the module that calls it, would be passed over"
        else:
            home = next((group for group in groups if not why_apart(next(iter(group.values())), layer)), None)
            if home is None:
                groups.append({name: layer})
            else:
                home[name] = layer
    for group in groups:
        (name, layer), *others = group.items()
        if not others:
            beside = [(n, other) for n, other in layers.items() if type(other) is MixT and n != name]
            reasons = [f"beside {n}, {why_apart(other, layer)}" for n, other in beside if n not in alone]
            alone[name] = "; ".join(reasons) or "no other layer is left to be one product with"
    return [group for group in groups if len(group) > 1], alone


def _timed(
    group: dict[str, MixT], siblings: Siblings, num_tokens: int, repeats: int, known: dict[str, tuple[float, float]]
) -> Row:
    first, *_ = operators = list(group.values())
    x = first.cores[0].new_ones(num_tokens, first.in_features)
    kind = f"{json.dumps([operator.spec for operator in operators])} {x.dtype} {x.device}"
    if kind not in known:
        with torch.no_grad():
            known[kind] = milliseconds(lambda x: [operator.multiply(x) for operator in operators], siblings, x, repeats)
    separate, together = known[kind]
    row: Row = {"tokens": num_tokens, "separate_ms": separate, "together_ms": together}
    if together >= separate:
        row |= {"chosen": "separate", "why": f"together they are not faster at {num_tokens} tokens"}
    return row


def _fuse(parent: nn.Module, group: dict[str, MixT], siblings: Siblings) -> None:
    for index, (name, operator) in enumerate(group.items()):
        setattr(parent, name, Sibling(operator, siblings, index))
        for core in operator.cores:
            core.data = core.data.new_empty(0)  # its values are in the stack
    sharing = _forward(parent)
    if sharing is None:
        sharing = parent.__dict__["forward"] = _Sharing(parent)
    sharing.groups.append(tuple(group))


def _part(parent: nn.Module, group: dict[str, MixT], siblings: Siblings) -> None:
    """Undo `_fuse`: the operators get what the stack holds now."""
    parent.__dict__.pop("forward", None)
    for index, (name, operator) in enumerate(group.items()):
        for core, value in zip(operator.cores, siblings.cores_of(index), strict=True):
            core.data = value.detach().clone()
            core.requires_grad_(siblings.get_parameter("core_0").requires_grad)
        sibling = getattr(parent, name)
        if isinstance(sibling, Sibling):  # else something was installed there inside
            operator.bias = sibling.bias
            setattr(parent, name, operator.train(sibling.training))


def _forward(parent: nn.Module) -> Any:
    """What stands in for the forward of its class; None if nothing does."""
    return vars(parent).get("forward")


def is_watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


class _Sharing:
    """The forward of a parent whose siblings share their products."""

    def __init__(self, parent: nn.Module) -> None:
        self.parent = parent
        self.groups: list[tuple[str, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.parent).forward(_Call(self.parent, self.groups), *args, **kwargs)  # pyright: ignore


class _Call:
    """`self` in one call of a parent's forward: the parent, except that its siblings share their products."""

    def __init__(self, parent: nn.Module, groups: Sequence[tuple[str, ...]]) -> None:
        self._parent = parent
        for names in groups:
            siblings = [getattr(parent, name) for name in names]
            if all(isinstance(sibling, Sibling) for sibling in siblings):  # else one was replaced meanwhile
                shared = _Shared(siblings[0].siblings)
                for name, sibling in zip(names, siblings, strict=True):
                    setattr(self, name, _Part(sibling, shared))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parent, name)


class _Shared:
    """The outputs of siblings for one input, until each is fetched."""

    def __init__(self, siblings: Siblings) -> None:
        self.siblings = siblings
        self.x: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def fetch(self, index: int, x: Tensor) -> Tensor:
        if self.x is not x or index not in self.outputs:
            self.x, self.outputs = x, dict(enumerate(self.siblings(x)))
        return self.outputs.pop(index)


class _Part:
    """A sibling in one call of its parent."""

    def __init__(self, sibling: Sibling, shared: _Shared) -> None:
        self._sibling, self._shared = sibling, shared

    def __call__(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        if is_watched(self._sibling):  # somebody wants to see it called
            return self._sibling(x)
        y = self._shared.fetch(self._sibling.index, x)
        return y if self._sibling.bias is None else y + self._sibling.bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sibling, name)
