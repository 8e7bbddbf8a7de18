"""How a model calls its blocks, recorded once, so that each block can be run alone afterwards.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.operators import Bypass
from tensormix.sites.locate import blocks
from tensormix.sites.seen import returns_of, seen_in
from tensormix.sites.twin import call_model, text_part


@dataclass
class Call:
    """How the model calls one block for one batch: hidden (B, T, D) and everything that it passes beside it."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple | list) else out

    def run_in_its_dtype(self, block: nn.Module, hidden: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """With all that is passed beside `hidden` in its dtype."""
        if hidden.dtype == self.hidden.dtype:
            return self.run(block, hidden)
        return Call(hidden, _cast(self.args, hidden.dtype), _cast(self.kwargs, hidden.dtype)).run(block, hidden)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if type(value) in (list, tuple) else value


class StandIn(nn.Module):
    """Stands where a block was, and has its attributes, but computes nothing."""

    def __init__(self, block: nn.Module, returns: str) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: the model must not see it
        self.pass_by = Bypass(returns=returns)

    def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks, e.g. attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Recorder(StandIn):
    """Notes how the model calls the block."""

    def __init__(self, block: nn.Module, returns: str) -> None:
        super().__init__(block, returns)
        self.calls: list[Call] = []

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(Call(hidden_states, args, kwargs))
        return self.pass_by(hidden_states)


@torch.no_grad()
def record_calls(
    model: nn.Module, batches: Iterable[Tensor], keep: Callable[[Tensor], Tensor] = lambda hidden: hidden
) -> list[list[Call]]:  # (B, T) each
    """Per block, per batch: how the model itself calls it. A block that text does not reach has no calls.

    Masks, positions and caches differ between the blocks of one model, so one block's arguments do not serve another.
    Those that are the same for several batches are there once.

    Args:
        keep: `hidden` is what it returns for what enters the first block, in all calls of a batch.

    Raises ValueError if a batch is not (B, T) token ids, blocks need more of each other than hidden states,
    or one is called more than once for one text.
    """
    layers = blocks(model)
    real = list(layers)
    _check_alone(model)
    recorders = [_Recorder(block, returns_of(model, index)) for index, block in enumerate(real)]
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    without_head = text_part(model)  # logits are of no use here, and large
    try:
        for index, recorder in enumerate(recorders):
            layers[index] = recorder
        for number, batch in enumerate(batches, 1):
            if batch.dim() != 2 or batch.is_floating_point():
                shape = tuple(batch.shape)
                raise ValueError(f"a calibration batch must be token ids of shape (B, T), got {batch.dtype} {shape}")
            _ask(model, without_head, batch.to(device))
            reached = [recorder for recorder in recorders if recorder.calls]
            _check_once(reached, number)
            _check_chain(reached)
            hidden = keep(reached[0].calls[-1].hidden)
            for call, known in ((recorder.calls[-1], recorder.calls[-2:][0]) for recorder in reached):
                call.hidden = hidden
                call.args, call.kwargs = _once(call.args, known.args), _once(call.kwargs, known.kwargs)
        return [recorder.calls for recorder in recorders]
    finally:
        for index, block in enumerate(real):
            layers[index] = block


def _check_once(reached: list[_Recorder], num_batches: int) -> None:
    """Raise ValueError if text reaches no block, or one more than once: its inputs are more than one call shows."""
    if not reached:
        raise ValueError("text reaches none of the blocks that were found, so there are no inputs to calibrate on")
    calls = max(len(recorder.calls) for recorder in reached)
    if calls > num_batches:
        kind = type(reached[0].__dict__["block"]).__name__
        raise ValueError(
            f"the model calls a block ({kind}) {calls // num_batches} times for one text, so the blocks cannot be run "
            "one by one; methods without calibration, such as svd and mixt, work there"
        )


def _check_chain(reached: list[_Recorder]) -> None:
    """Raise ValueError if something else enters a block than what left the one before, which let it pass."""
    first = reached[0].calls[-1].hidden
    for recorder in reached[1:]:
        hidden = recorder.calls[-1].hidden
        if hidden is not first and not (hidden.shape == first.shape and torch.equal(hidden, first)):
            raise ValueError(
                f"the model changes what leaves a block before it enters the next ({type(recorder.block).__name__}), "
                "so the blocks cannot be run one by one; methods without calibration, such as svd and mixt, work there"
            )


def _ask(model: nn.Module, without_head: nn.Module, batch: Tensor) -> None:  # (B, T)
    """One pass through the recorders. Raises ValueError if the model cannot do with what they return."""
    try:
        call_model(without_head, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"the blocks of a {type(model).__name__} cannot be run one by one, since the model needs more of them than "
            f"hidden states, or other inputs than text ({error}); methods without calibration, such as svd and mixt, "
            "work there"
        ) from error


def _check_alone(model: nn.Module) -> None:
    """Raise ValueError if a block reads more of the one before than its hidden states."""
    for index, seen in enumerate(seen_in(model) or ()):
        if seen is not None and seen.hands_on:
            raise ValueError(
                f"block {index} ({type(blocks(model)[index]).__name__}) hands more to the next block than hidden "
                "states, so the blocks cannot be run one by one; methods without calibration, such as svd and mixt, "
                "work there"
            )


def _once(new: Any, known: Any) -> Any:
    """`new`, where every tensor that equals the one at its place in `known` is that one."""
    if type(new) is not type(known):
        return new
    if isinstance(new, Tensor):
        same = new.dtype == known.dtype and new.device == known.device and torch.equal(new, known)
        return known if same else new
    if type(new) is dict and new:  # an empty one is for blocks to leave something in
        return {key: _once(value, known.get(key)) for key, value in new.items()}
    if type(new) is tuple and len(new) == len(known):
        return tuple(_once(a, b) for a, b in zip(new, known, strict=True))
    return new


def apart(calls: list[list[Call]]) -> list[list[Call]]:
    """The same calls for another stream: what blocks leave to each other, such as keys and values, stays in each."""
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if isinstance(value, MutableMapping) and not (type(value) is dict and value):
            return copies.setdefault(id(value), copy.copy(value))
        return value

    return [
        [
            Call(call.hidden, tuple(map(own, call.args)), {key: own(value) for key, value in call.kwargs.items()})
            for call in of_block
        ]
        for of_block in calls
    ]


class Activations:
    """Keeps the hidden states between blocks: in memory, or in files of `folder`, whose pages the kernel may drop.

    A file has no name from the moment it is mapped, so that it is gone with its tensor, whatever happens.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self._numbers = folder, count()

    def keep(self, hidden: Tensor) -> Tensor:
        if self.folder is None:
            return hidden
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{next(self._numbers)}.bin"
        with file.open("wb") as handle:  # a hole in the file would be found out by a signal, when the disk is full
            os.posix_fallocate(handle.fileno(), 0, max(1, hidden.numel() * hidden.element_size()))
        kept = torch.from_file(str(file), shared=True, size=hidden.numel(), dtype=hidden.dtype).view_as(hidden)
        file.unlink()
        return kept.copy_(hidden)
