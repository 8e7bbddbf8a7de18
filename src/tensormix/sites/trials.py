"""Layers of a block whose outputs and inputs are changed while the twin runs, and who notices.

The output of one layer is changed, the input of another is changed back, and nothing that leaves this block or a later
one may move.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tensormix.sites.families import is_dense
from tensormix.sites.locate import locate_blocks
from tensormix.sites.sites import Site
from tensormix.sites.twin import Twin, twin_of

# Of the largest entry of what a block adds to its input: rounding in fp32 is far below, and what breaks far above.
_TOLERANCE = 1e-3


@dataclass
class Finding:
    """Why a change is noticed.

    Attributes:
        reader: the first later block that notices, where the block itself does not.
        between: the names of the modules that what was changed passes on its way from layer to layer.
        beside: the dense layers of the same module that are called before the last one, and do not change.
        is_unseen: whether nothing, or nothing finite, reached the last layer, so that the twin shows nothing.
        skipped: a layer that was passed by while others were called: something else reads its weight.
    """

    reader: str | None = None
    between: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    skipped: str | None = None
    is_unseen: bool = False

    def reason(self, gates: Sequence[str] = ()) -> str:
        """A clause that names what lies between. `gates` are layers that may make one."""
        if self.reader is not None:
            return f"{self.reader} reads them too, and would not know of it"
        if self.skipped is not None:
            return f"{self.skipped} is not called as a layer, so that something else reads its weight"
        if self.is_unseen:
            return "what passes from the one to the other could not be followed with random weights"
        if self.between:
            return f"{', '.join(self.between)} lies between and does not let that pass"
        what = f", perhaps a gate made by {', '.join(gates)}," if gates else ", a gate or a norm perhaps,"
        return f"something between them{what} does not let that pass"


class Called(NamedTuple):
    """A layer, or another innermost module, as it is called."""

    name: str
    is_dense: bool
    has_weights: bool
    inputs: Tensor | None


Change = Callable[[Tensor], Tensor]  # of the outputs, or the inputs, of one layer


def is_as_built(model: nn.Module, block: int, name: str, side: Literal["outputs", "inputs"]) -> bool:
    """Whether a layer of a block has on this side the size that it has in the twin, which then shows how it works."""
    twin = twin_of(model)
    if twin is None or block >= len(twin.layers):
        return False
    try:
        own, other = (Site(name, "linear", None, block, part.get_submodule(name)) for part in (model, twin.model))
    except AttributeError:
        return False
    if not is_dense(other.module):
        return False
    return own.weight.shape[side == "inputs"] == other.weight.shape[side == "inputs"]


_known: WeakKeyDictionary[Twin, dict[Any, Any]] = WeakKeyDictionary()


def tried(
    model: nn.Module, block: int, key: tuple[object, ...], outputs: Mapping[str, Change], inputs: Mapping[str, Change]
) -> Finding | None:
    """As the layers of one block of the twin are called with these changes; once for all blocks of its kind."""
    twin = twin_of(model)
    built = [is_as_built(model, block, name, "outputs") for name in outputs]
    built += [is_as_built(model, block, name, "inputs") for name in inputs]
    if twin is None or not all(built):
        return None
    first, root = twin.kinds[block], locate_blocks(model)[0]
    prefix = f"{root}.{block}."
    names = {name: name.removeprefix(prefix) for name in (*outputs, *inputs)}
    known = _known.setdefault(twin, {})
    place = first, str(key).replace(prefix, "")
    if place not in known:
        changes = [{names[name]: change for name, change in part.items()} for part in (outputs, inputs)]
        try:
            known[place] = _tried(twin, first, *changes)
        except Exception:  # whatever a model may not like about a few tokens, nothing was seen then
            known[place] = None
    found: Finding | None = known[place]
    if found is None:
        return None
    reader = None if found.reader is None else f"{root}.{found.reader}"
    return Finding(
        reader, [prefix + n for n in found.between], [prefix + n for n in found.beside],
        None if found.skipped is None else prefix + found.skipped, found.is_unseen,
    )  # fmt: skip


def _tried(twin: Twin, index: int, outputs: Mapping[str, Change], inputs: Mapping[str, Change]) -> Finding | None:
    known = _known[twin]
    if "unchanged" not in known:
        known["unchanged"] = _left(twin)
    calls: list[Called] = []
    before = known["unchanged"]
    after = _left(twin, lambda block: _changed(block, outputs, inputs, calls), index)
    called = {call.name for call in calls}
    missing = [name for name in (*outputs, *inputs) if name not in called]
    if len(missing) == len(outputs) + len(inputs):  # this text does not call them
        return None
    moved = [number for number in before if number >= index and _differ(before[number], after[number])]
    unseen = any(call.name in inputs and not _tells(call.inputs) for call in calls)
    if not moved and not missing:
        return Finding(is_unseen=True) if unseen else None
    usual: list[Called] = []
    _left(twin, lambda block: _changed(block, {}, {}, usual), index)
    changed = {*outputs, *inputs}
    parts = {name.rpartition(".")[0] for name in changed}
    last = max((n for n, call in enumerate(calls) if call.name in inputs), default=0)
    both = zip(calls[:last], usual[:last], strict=False)
    reached = [call for call, other in both if call.name == other.name and _moved(call, other)]
    passed = [call for call in reached if not call.is_dense and call.name not in changed]
    weighted = [call for call in passed if call.has_weights]  # an activation treats all alike
    between = [call.name for call in weighted or passed]
    beside = [call.name for call in calls[:last] if call.is_dense and call.name.rpartition(".")[0] in parts]
    return Finding(
        str(moved[0]) if moved and moved[0] > index else None,
        list(dict.fromkeys(between if inputs.keys() <= called else [])),
        [name for name in dict.fromkeys(beside) if name not in changed],
        missing[0] if missing else None,
    )


def _tells(inputs: Tensor | None) -> bool:
    return inputs is not None and bool(inputs.isfinite().all()) and bool(inputs.any())


def _moved(call: Called, other: Called) -> bool:
    if call.inputs is None or other.inputs is None or call.inputs.shape != other.inputs.shape:
        return False
    return not torch.allclose(call.inputs, other.inputs, rtol=1e-3, atol=1e-3 * float(other.inputs.abs().max()))


def _left(twin: Twin, change: Any = None, index: int = -1) -> dict[int, tuple[Tensor, Tensor]]:  # (B, T, D) each
    """What enters and leaves each block that runs."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watch(number: int, block: nn.Module) -> Iterator[None]:
        def note(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            found[number] = args[0], out[0] if isinstance(out, tuple | list) else out

        with ExitStack() as open_hooks:
            handle = block.register_forward_hook(note)
            open_hooks.callback(handle.remove)
            if number == index:
                open_hooks.enter_context(change(block))
            yield

    twin.run(watch=watch)
    return found


def _differ(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> bool:
    """Whether a block did something else. What is not finite tells nothing."""
    (entered, left), (_, now) = before, after
    added = left - entered if left.shape == entered.shape else left
    scale = float(added.abs().max())
    moved = float((now - left).abs().max())
    return scale > 0 and moved > _TOLERANCE * scale


@contextmanager
def _changed(
    block: nn.Module, outputs: Mapping[str, Change], inputs: Mapping[str, Change], calls: list[Called]
) -> Iterator[None]:
    """The outputs and inputs of these layers changed; `calls` gets the innermost modules as they are called."""
    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name in outputs:
                change = outputs[name]
                handle = module.register_forward_hook(lambda _m, _a, out, change=change: change(out))
                hooks.callback(handle.remove)
            if name in inputs:
                change = inputs[name]
                handle = module.register_forward_pre_hook(lambda _m, args, change=change: (change(args[0]), *args[1:]))
                hooks.callback(handle.remove)
            if name and (name in outputs or name in inputs or not list(module.children())):
                hooks.callback(module.register_forward_pre_hook(partial(_note, calls, name)).remove)
        yield


def _note(calls: list[Called], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    first = args[0] if args and isinstance(args[0], Tensor) else None
    calls.append(Called(name, is_dense(module), any(True for _ in module.parameters()), first))
