"""Siblings in one call, for as long as it is wanted: q, k and v of a block read the same input, and so do gate, up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tensormix.inference.faster import milliseconds
from tensormix.operators import MixT, Siblings, StructuredLinear, View, why_apart
from tensormix.operators.shared_calls import Sharing, is_watched, share_calls, sharing_of, stop_sharing
from tensormix.rows import Row
from tensormix.sites import FUSED, role_of
from tensormix.sites.installing import free_name

Layers = dict[str, nn.Module]  # name in the parent -> layer


@contextmanager
def fuse_siblings(model: nn.Module, *, num_tokens: int | None = None, repeats: int = 15) -> Iterator[list[Row]]:
    """Inside, the MixT layers q, k and v of a block, or gate and up, are one product that reads x once.

    Layers become one if they agree on inputs, `num_branches`, `bond` and padding, on dtype and device, and on whether
    they are trained. With `num_tokens` only those do that are faster so at this many tokens: both forms are timed
    first, on this machine, in turns.

    Nothing is stored twice. Inside, the cores of siblings are one parameter (make an optimizer inside too) of an owner
    beside them, and the layers are views of it: `save_pretrained` writes it so, and a model that is loaded from there
    has them in one product from the start. On leaving, the layers are as they were, with the values that were trained
    or loaded inside.

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
    fused: list[tuple[nn.Module, dict[str, MixT], str]] = []
    rows: list[Row] = []
    try:
        for path, parent, layers in _families(model):
            groups, rest = _groups(parent, layers)
            rows += [{"module": path, "siblings": [n], "chosen": "separate", "why": why} for n, why in rest.items()]
            for group in groups:
                row: Row = {"module": path, "siblings": list(group), "chosen": "together", "why": ""}
                siblings = Siblings(names=list(group), parts=list(group.values()))
                if num_tokens is not None:
                    row |= _timed(group, siblings, num_tokens, repeats, known)
                rows.append(row)
                if row["chosen"] == "together":
                    fused.append((parent, group, _fuse(parent, group, siblings)))
        yield rows
    finally:
        for parent, group, owner_name in fused:
            _part(parent, group, owner_name)


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
        elif is_watched(layer) or "forward" in vars(layer) or not isinstance(sharing_of(parent), Sharing | None):
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
            known[kind] = milliseconds(
                lambda x: [operator.multiply(x) for operator in operators],
                lambda x: list(siblings(x).values()),
                x,
                repeats,
            )
    separate, together = known[kind]
    row: Row = {"tokens": num_tokens, "separate_ms": separate, "together_ms": together}
    if together >= separate:
        row |= {"chosen": "separate", "why": f"together they are not faster at {num_tokens} tokens"}
    return row


def _fuse(parent: nn.Module, group: dict[str, MixT], siblings: Siblings) -> str:
    """Returns the name under which `parent` has the siblings from now on."""
    owner_name = free_name(parent, "siblings")
    parent.add_module(owner_name, siblings.train(parent.training))
    for name, view in siblings.views(owner_name).items():
        operator = group[name]
        view.bias, view.weight = operator.bias, operator.weight
        setattr(parent, name, view.train(operator.training))
        for core in operator.cores:
            core.data = core.data.new_empty(0)  # its values are in the stack
    share_calls(parent, group)
    return owner_name


def _part(parent: nn.Module, group: dict[str, MixT], owner_name: str) -> None:
    """Undo `_fuse`: the operators get what the stack holds now."""
    siblings: Any = parent.get_submodule(owner_name)
    delattr(parent, owner_name)
    stop_sharing(parent, group)
    for name, operator in group.items():
        for core, value in zip(operator.cores, siblings.cores_of(name), strict=True):
            core.data = value.detach().clone()
            core.requires_grad_(siblings.get_parameter("core_0").requires_grad)
        view = getattr(parent, name)
        if isinstance(view, View):  # else something was installed there inside
            operator.bias = view.bias
            setattr(parent, name, operator.train(view.training))
