"""The operators of a model by their names and specs: read from it, and put empty into a skeleton."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tensormix.operators import Owner, SlicedBlock, StandIn, build, connect, outermost
from tensormix.sites import dense_at, install, locate_blocks


def names_in(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Each name of a checkpoint -> the name of the same module in this model.

    A checkpoint of a causal model is read by its bare model, by a classifier or by a model of images and text too: what
    stands before the blocks, such as `model.`, differs between them.
    """
    names, root = list(names), locate_blocks(model)[0]
    ours, _, blocks = root.rpartition(".")
    inside = re.compile(rf"((?P<base>.+)\.)?{re.escape(blocks)}\.\d+(\.|$)")
    matches = [found for found in map(inside.match, names) if found]
    theirs = (matches[0]["base"] or "") if matches else ours

    def here(name: str) -> str:
        if theirs == ours or not (name == theirs or f"{name}.".startswith(f"{theirs}.") or not theirs):
            return name
        rest = name[len(theirs) :].lstrip(".")
        return f"{ours}.{rest}".strip(".")

    return {name: here(name) for name in names}


def install_empty(model: nn.Module, operators: dict[str, dict[str, Any]]) -> None:
    """Put an empty operator, on meta, at every module named in `operators`: module name -> spec with "bias".

    Raises ValueError if a name is not in the model, or a spec cannot be built or does not fit there.
    """
    here = names_in(model, operators)
    operators = {here[name]: entry for name, entry in operators.items()}
    with torch.device("meta"):
        made = {name: build({k: v for k, v in entry.items() if k != "bias"}) for name, entry in operators.items()}
    # Owners first: their dtype is that of the dense layers around which they stand.
    for name, operator in sorted(made.items(), key=lambda item: not isinstance(item[1], Owner)):
        parent, _, child = name.rpartition(".")
        try:
            old = model.get_submodule(parent) if isinstance(operator, Owner) else dense_at(model, name)
        except AttributeError:
            raise ValueError(
                f"quantization_config: operators names {name!r}, which a {type(model).__name__} does not have"
            ) from None
        dtype = next(old.parameters()).dtype
        operator.to(dtype)
        if isinstance(operator, Owner):
            old.add_module(child, operator.train(old.training))
            continue
        if operators[name].get("bias") and getattr(old, "bias", None) is None:
            operator.bias = nn.Parameter(torch.empty(operator.bias_shape, dtype=dtype, device="meta"))
        install(model, name, operator)
    connect(model)
    record_bypassed(model)


def check_connected(model: nn.Module) -> None:
    missing = connect(model)
    if missing:
        name: Any = missing[0]
        raise ValueError(
            f"{name} is a view of {model.get_submodule(name).owner_name!r}, and no module around it has an owner of "
            f"that name ({len(missing)} such views)"
        )


def record_bypassed(model: nn.Module) -> None:
    """Let `output_hidden_states` see dropped blocks too: transformers looks for blocks by their class."""
    try:
        from transformers.utils.output_capturing import install_output_capuring_hook as record
    except ImportError:  # releases that collect the states elsewhere
        return
    for block in model.modules():
        if isinstance(block, StandIn | SlicedBlock) and not block._forward_hooks:
            record(block, "hidden_states", 0)


def operators_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The spec of every outermost operator: module name -> spec with "bias"."""
    entries: dict[str, dict[str, Any]] = {}
    for name, operator in outermost(model):
        bias = {"bias": operator.bias is not None} if hasattr(operator, "bias") else {}
        entries[name] = {**operator.spec, **bias}
    return entries


def fitted_blocks(model: nn.Module) -> list[str]:
    """The names of the blocks of the model's own kind that were fitted to take the place of others."""
    if not any("is_replacement" in vars(module) for module in model.modules()):
        return []
    root, layers = locate_blocks(model)
    return [f"{root}.{index}" for index, block in enumerate(layers) if "is_replacement" in vars(block)]
