"""The rest of a model, from one block on: what enters the blocks is known, and need not be made again.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.sites.calls import StandIn
from tensormix.sites.locate import blocks
from tensormix.sites.seen import returns_of, seen_in


class _Before(StandIn):
    """A block that need not run; the last of them hands on what is known to leave it."""

    def __init__(self, block: nn.Module, returns: str, leaving: Tensor | None) -> None:
        super().__init__(block, returns)
        self.leaving = leaving

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.pass_by(hidden_states if self.leaving is None else self.leaving)


class Tails:
    """What enters every block for some batches, so that a model that is changed in one block runs from there on.

    Where blocks need more of each other than hidden states, or the model changes these between two blocks, the model is
    run whole: the outcome is the same to the bit.

    Args:
        run: the model on batch number n, without gradients.

    Attributes:
        first: what `run` gave on each batch, before anything was changed.
    """

    def __init__(self, model: nn.Module, num_batches: int, run: Callable[[int], Any]) -> None:
        self.model, self.num_batches, self._run = model, num_batches, run
        self._layers = blocks(model)
        self._returns = [returns_of(model, index) for index in range(len(self._layers))]
        self._entering: list[list[Tensor]] = []  # of each batch, in front of each block but the first
        self.first: list[Any] = []
        chained = not any(seen is not None and seen.hands_on for seen in seen_in(model) or ())
        for number in range(num_batches):
            states, out = self._watched(number)
            self.first.append(out)
            chained = chained and states is not None
            self._entering.append(states or [])
        self.is_chained = chained
        if not chained:
            self._entering = []

    def _watched(self, number: int) -> tuple[list[Tensor] | None, Any]:
        """What enters each block but the first, (B, T, D); None if they are no chain. And what the model gives."""
        layers = self._layers
        entered: list[list[Tensor]] = [[] for _ in layers]
        left: list[list[Tensor]] = [[] for _ in layers]

        def watch(index: int) -> Callable[..., None]:
            def hook(_block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                entered[index].append(args[0] if args else kwargs["hidden_states"])
                left[index].append(out[0] if isinstance(out, tuple | list) else out)

            return hook

        with ExitStack() as hooks:
            for index, block in enumerate(layers):
                hooks.callback(block.register_forward_hook(watch(index), with_kwargs=True).remove)
            out = self._run(number)
        if any(len(states) != 1 for states in (*entered, *left)):
            return None, out
        chain = zip(left[:-1], entered[1:], strict=True)
        if not all(before[0] is after[0] or torch.equal(before[0], after[0]) for before, after in chain):
            return None, out
        return [states[0].detach() for states in entered[1:]], out

    def run(self, index: int) -> Iterator[Any]:
        """What the model gives on each batch as it is now, of which the blocks before `index` are unchanged."""
        for number in range(self.num_batches):
            with self._from(index, number):
                out = self._run(number)
            yield out

    @contextmanager
    def _from(self, index: int, number: int) -> Iterator[None]:
        """While open, what is known enters block `index`, and those before it do not run."""
        layers = self._layers
        before: Sequence[nn.Module] = list(layers)[:index] if self.is_chained else []
        try:
            for place, block in enumerate(before):
                states = self._entering[number][index - 1] if place == index - 1 else None
                layers[place] = _Before(block, self._returns[place], states)
            yield
        finally:
            for place, block in enumerate(before):
                layers[place] = block
