"""Whether a model can do without some of its blocks, seen on a twin before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensormix.sites.seen import seen_in
from tensormix.sites.twin import Twin, twin_of


def check_left_out(model: nn.Module, stand_ins: Mapping[int, nn.Module]) -> None:
    """Raise ValueError, naming the blocks, if the model cannot do without those that `stand_ins` replace.

    Some blocks leave keys and values to later ones, or hand on more than hidden states.
    """
    twin = twin_of(model)
    if twin is None or not stand_ins:
        return
    seen, root = seen_in(model), twin.root
    if seen is None:
        raise ValueError(
            f"{root}.{min(stand_ins)}: a {type(model).__name__} could not be tried on a few tokens, so it is not known "
            "whether it works without this block; compress its layers instead"
        )
    for index in stand_ins:
        found = seen[index]
        if found is not None and (found.hands_on or found.reached_into):
            uses = f"the model uses {', '.join(sorted(found.reached_into))} of its blocks"
            reason = "the next block needs more of it than hidden states" if found.hands_on else uses
            raise ValueError(f"{root}.{index}: {reason}, so it cannot be left out; compress its layers instead")
    _check_cache(twin, stand_ins)
    _check_loading(twin, stand_ins)
    try:
        twin.run(put=stand_ins)
    except Exception as error:
        reader = twin.at
        alone = [index for index in stand_ins if index < reader and _fails(twin, {index: stand_ins[index]})]
        needed = alone[-1] if alone else min(stand_ins)
        raise ValueError(
            f"{root}.{needed}: block {reader} needs what it leaves to later blocks (such as keys and values), so it "
            f"cannot be left out; leave out block {reader} and those like it, or compress its layers"
        ) from error
    if not _fails(twin, {}, use_cache=True) and _fails(twin, stand_ins, use_cache=True):
        raise ValueError(
            f"{root}.{min(stand_ins)}: with a cache the model needs more of it than hidden states, so it cannot be "
            "left out; compress its layers instead"
        )


def _check_cache(twin: Twin, stand_ins: Mapping[int, nn.Module]) -> None:
    """Raise ValueError, naming the block, if one keeps its keys and values under other numbers than its own."""
    for index in stand_ins:
        known = (getattr(part, "layer_idx", None) for part in twin.layers[index].modules())
        numbers = {number for number in known if isinstance(number, int) and number not in (-1, index)}
        if numbers:
            raise ValueError(
                f"{twin.root}.{index}: it keeps keys and values for the layers {sorted(numbers | {index})} of the "
                "cache, so it cannot be left out; compress its layers instead"
            )


def _check_loading(twin: Twin, stand_ins: Mapping[int, nn.Module]) -> None:
    """Raise ValueError, naming the block, if the model reaches into its blocks for more when it is loaded."""
    holder, real = twin.model.get_submodule(twin.root.rpartition(".")[0]), list(twin.layers)
    try:
        for index, part in stand_ins.items():
            twin.layers[index] = part
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            if hasattr(holder, "_init_weights"):
                holder._init_weights(holder)
    except AttributeError as error:
        raise ValueError(
            f"{twin.root}.{min(stand_ins)}: the model reaches into its blocks when it is loaded ({error}), so none can "
            "be left out; compress their layers instead"
        ) from error
    finally:
        for index, block in enumerate(real):
            twin.layers[index] = block


def _fails(twin: Twin, stand_ins: Mapping[int, nn.Module], **options: Any) -> bool:
    try:
        twin.run(put=stand_ins, **options)
    except Exception:
        return True
    return False
