"""The one pass over the blocks of a model: hidden states come in, leave, and enter the next block.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tensormix.sites.calls import Call, apart, record_calls
from tensormix.sites.locate import locate_blocks

Keep = Callable[[Tensor], Tensor]  # puts hidden states where they stay until the next block; see `Activations.keep`
Run = Callable[[Call, Tensor], Tensor]


class Blocks:
    """Where the blocks of a model are: here in the model itself, all the time."""

    @contextmanager
    def rest(self) -> Iterator[None]:
        """While open, everything outside the blocks has its weights."""
        yield

    def enter(self, index: int) -> None:
        """Block `index` has its dense weights afterwards."""

    def release(self, index: int) -> None:
        """The weights of block `index` are no longer needed."""

    def tidy(self) -> None:
        """Something large is no longer needed: a batch, the statistics of a block, an expert, a site."""


class Part:
    """Consecutive blocks of a pass, which are in memory together, and what enters the first of them.

    `calls` says how the model calls each block of it, batch by batch, in every stream of the pass. `hidden` has one
    list of states (B, T, D), one for each batch, for every stream. A stream that leaves
    the blocks takes the place of what entered them, batch by batch.
    """

    def __init__(
        self, home: Blocks, layers: nn.ModuleList, span: range, calls: dict[str, list[list[Call]]],
        hidden: dict[str, list[Tensor]], keep: Keep,
    ) -> None:  # fmt: skip
        self.span, self.calls, self.hidden = span, calls, hidden
        self.is_entered = self.is_last = False
        self._home, self._layers, self._keep = home, layers, keep
        self._passed: set[str] = set()

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks as they are now: dense, or what was put in their place."""
        return [self._layers[index] for index in self.span]

    def enter(self) -> None:
        """Give the blocks their dense weights, unless `is_entered` says that they have weights already."""
        if not self.is_entered:
            for index in self.span:
                self._home.enter(index)
        self.is_entered = True

    @torch.no_grad()
    def run(self, stream: str) -> Iterator[Tensor]:  # (B, T, D) each
        """What leaves the blocks, batch by batch; it is not kept."""
        self.enter()
        for number, states in enumerate(self.hidden[stream]):
            for index, block in zip(self.span, self.modules, strict=True):
                if self.calls[stream][index]:  # text reaches it
                    states = self.calls[stream][index][number].run(block, states)
            yield states
            self._home.tidy()

    @torch.no_grad()
    def pass_on(self, stream: str, run: Run | None = None) -> list[Tensor]:  # (B, T, D) each
        """Let the stream leave the blocks, or what `run` says in their place: what enters the next block."""
        hidden = self.hidden[stream]
        self._passed.add(stream)
        calls = self.calls[stream][self.span[0]]
        leaving = self.run(stream) if run is None or not calls else map(run, calls, hidden)
        for number, states in enumerate(leaving):
            hidden[number] = self._keep(states)
        return hidden

    def advance(self) -> None:
        """Let every stream leave that did not yet, unless no block comes after these."""
        for stream in () if self.is_last else sorted(self.hidden.keys() - self._passed):
            self.pass_on(stream)


@torch.no_grad()
def through(
    model: nn.Module, home: Blocks, batches: Iterable[Tensor], keep: Keep = lambda states: states, *,
    streams: Iterable[str] = ("dense",), spans: Sequence[range] | None = None,
) -> Iterator[Part]:  # fmt: skip
    """One pass over the blocks, from the first on. What a block is changed to while it is there is what states pass.

    Args:
        home: where the blocks come from, and go back to.
        batches: token ids (B, T).
        keep: where hidden states stay between blocks.
        streams: names of the lists of states, which all begin with what enters the first block.
        spans: the blocks that are there together, in order and without gaps from block 0; each alone by default.

    Raises:
        ValueError: there are no batches, or one is not (B, T) token ids.
    """
    layers = locate_blocks(model)[1]

    def keep_first(states: Tensor) -> Tensor:
        home.tidy()
        return keep(states)

    with home.rest():
        calls = record_calls(model, batches, keep_first)
    start = [call.hidden for call in next((of_block for of_block in calls if of_block), ())]
    if not start:
        raise ValueError("there are no calibration batches: the iterable is empty")
    for call in (call for of_block in calls for call in of_block):
        call.hidden = start[0]  # does not hold the others on
    hidden = {stream: list(start) for stream in sorted(streams)}
    of_stream = {stream: apart(calls) if number else calls for number, stream in enumerate(hidden)}
    del start
    spans = [range(index, index + 1) for index in range(len(layers))] if spans is None else spans
    for span in spans:
        part = Part(home, layers, span, of_stream, hidden, keep)
        part.is_last = span is spans[-1]
        yield part
        part.advance()
        for index in span if part.is_entered else ():
            home.release(index)
