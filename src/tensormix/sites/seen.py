"""What a few tokens through a twin show of each block: what it returns, and which of its matrices are layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensormix.operators import StandIn
from tensormix.sites.families import is_dense
from tensormix.sites.locate import blocks
from tensormix.sites.twin import Twin, twin_of


@dataclass
class Seen:
    """What was seen of a block.

    Attributes:
        returns: "tensor", "tuple" (two, of which the hidden states are the first), or "tuple of N".
        hands_on: whether the model needs what a block returns beside the hidden states: the next one reads it.
        attributes: strings, numbers and truth values that the model reads of the block.
        buffers: name -> shape of what the model fills inside the block when it is loaded.
        reached_into: names of parts and functions of the block that the model uses without calling the block.
        by_hand: names of layers inside the block whose weight is multiplied by something else than the layer.
        idle: names of layers that text never reaches.
    """

    returns: str = "tensor"
    attributes: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, list[int]] = field(default_factory=dict)
    reached_into: set[str] = field(default_factory=set)
    hands_on: bool = False
    by_hand: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)

    @property
    def no_layers(self) -> set[str]:
        """What must stay as it is."""
        return self.by_hand | self.idle


def seen_in(model: nn.Module) -> list[Seen | None] | None:
    """What was seen of each block: None for one that text never reaches, or if nothing could be seen at all."""
    twin = twin_of(model)
    if twin is None:
        return None
    if not hasattr(twin, "seen"):
        vars(twin)["seen"] = _look(twin)
    return vars(twin)["seen"]


def returns_of(model: nn.Module, index: int) -> str:
    """What block `index` returns, as `Seen.returns`; a tensor if nothing could be seen."""
    block = blocks(model)[index]
    if isinstance(block, StandIn):
        return block.returns
    seen = seen_in(model)
    found = None if seen is None else seen[index]
    return "tensor" if found is None else found.returns


def prepare_stand_in(model: nn.Module, index: int, stand_in: nn.Module) -> None:
    """Give what stands in for block `index` the attributes that the model reads there."""
    seen = seen_in(model)
    found = None if seen is None else seen[index]
    if isinstance(stand_in, StandIn) and found is not None:
        stand_in.keep(found.attributes, found.buffers)


def _loading_buffers(twin: Twin) -> dict[int, dict[str, list[int]]]:
    """For each kind the buffers inside a block that the model fills when it is loaded, with their shapes."""
    holder = twin.model.get_submodule(twin.root.rpartition(".")[0])
    twin.read = {}
    with twin.watched(), torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        if hasattr(holder, "_init_weights"):
            holder._init_weights(holder)
    found: dict[int, dict[str, list[int]]] = {}
    for kind, read in twin.read.items():
        parts = {name: part for name, part in read.items() if isinstance(part, nn.Module)}
        buffers = [(f"{name}.{leaf}", b) for name, part in parts.items() for leaf, b in _unsaved(part)]
        found[kind] = {path: list(buffer.shape) for path, buffer in buffers}
    return found


def _unsaved(part: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that no checkpoint holds."""
    saved = part.state_dict()
    return [(name, buffer) for name, buffer in part.named_buffers() if name not in saved]


def _look(twin: Twin) -> list[Seen | None] | None:
    found: dict[int, Seen] = {}
    called: dict[int, set[str]] = {}

    @contextmanager
    def watch(index: int, block: nn.Module) -> Iterator[None]:
        watcher = _Watcher(block)
        with watcher.listening(), watcher:
            yield
        seen = found.setdefault(index, Seen())
        seen.by_hand |= watcher.by_hand
        called.setdefault(index, set()).update(watcher.called)

    def leave(index: int, left: Any) -> Any:
        if isinstance(left, tuple | list):
            found[index].returns = "tuple" if len(left) == 2 else f"tuple of {len(left)}"
        # What has fields of its own is read by their names, which no stand-in has.
        found[index].hands_on |= not isinstance(left, Tensor) and type(left) not in (tuple, list)
        return left

    try:
        whole = twin.run(watch=watch, leave=leave)
        _try(twin, use_cache=True)  # for what is read of blocks then
        for index, read in twin.read.items():
            if index in found:
                plain = {name: value for name, value in read.items() if isinstance(value, bool | int | float | str)}
                found[index].attributes, found[index].reached_into = plain, set(read) - set(plain)
    except Exception:  # whatever a model may not like about a few tokens, nothing was seen then
        return None
    for index, buffers in _loading_buffers(twin).items():
        if index in found:
            found[index].buffers = buffers
    _look_in_training(twin, watch)
    for index, seen in found.items():
        seen.idle = _idle(twin.layers[index], called[index] | seen.by_hand)
        several = seen.returns not in ("tensor", "tuple of 1")
        seen.hands_on = seen.hands_on or (several and _is_read(twin, index, whole))
    return _each(twin, found)


def _each(twin: Twin, found: dict[int, Seen]) -> list[Seen | None]:
    """What was seen of each block. Those that call some members of a list alone may each call others."""
    choosing = {kind for kind, seen in found.items() if any(_in_any_list(name) != name for name in seen.idle)}
    each = [found.get(kind) for kind in twin.kinds]
    called: dict[int, set[str]] = {}

    @contextmanager
    def watch(index: int, block: nn.Module) -> Iterator[None]:
        watcher = _Watcher(block)
        with watcher.listening():
            yield
        called[index] = watcher.called

    if choosing:
        _try(twin, watch=watch, every=tuple(index for index, kind in enumerate(twin.kinds) if kind in choosing))
    for index, names in called.items():
        seen = each[index]
        if seen is not None and twin.kinds[index] in choosing:
            each[index] = replace(seen, idle=_idle(twin.layers[index], names | seen.by_hand))
    return each


def _look_in_training(twin: Twin, watch: Any) -> None:
    """Some models multiply weights by hand in training alone. One that does not train on a few tokens shows nothing."""
    twin.model.train()
    _try(twin, watch=watch)
    twin.model.eval()


def _try(twin: Twin, **options: Any) -> None:
    """A pass that may fail: what was seen until then counts."""
    with suppress(Exception):
        twin.run(**options)


def _is_read(twin: Twin, kind: int, whole: Tensor) -> bool:
    """Whether the model notices that blocks of this kind return nothing beside the hidden states."""

    def leave(index: int, left: Any) -> Any:
        alike = twin.kinds[index] == kind
        return (left[0], *(None for _ in left[1:])) if alike and isinstance(left, tuple | list) else left

    try:
        return not torch.equal(twin.run(leave=leave), whole)
    except Exception:
        return True


def _idle(block: nn.Module, reached: set[str]) -> set[str]:
    """The dense layers that were not reached, but for experts: a few tokens do not visit all of them.

    Other lists have a member for each block, or each language, and the rest of it is never called there.
    """
    shapes = {_in_any_list(name) for name in reached if "expert" in name}
    dense = {name for name, part in block.named_modules() if is_dense(part)}
    return {name for name in dense - reached if _in_any_list(name) not in shapes}


def _in_any_list(name: str) -> str:
    return re.sub(r"(?<![^._])\d+(?=\.)", "*", name)


class _Watcher(TorchDispatchMode):
    """While open, notes which dense layers of a block are called, and whose weights are used outside their calls."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = {name: part for name, part in block.named_modules() if is_dense(part)}
        self.names = {_place(part.get_parameter("weight")): name for name, part in self.layers.items()}
        self.open: list[str] = []
        self.called: set[str] = set()
        self.by_hand: set[str] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = []
        for name, part in self.layers.items():
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            handles.append(part.register_forward_hook(lambda *_, name=name: self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> None:
        self.open.append(name)
        self.called.add(name)

    def _leave(self, name: str) -> None:
        self.open.remove(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            name = self.names.get(_place(leaf)) if isinstance(leaf, Tensor) and not leaf.is_meta else None
            if name is not None and name not in self.open:
                self.by_hand.add(name)
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
