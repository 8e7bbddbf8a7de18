"""What enters the blocks: the hidden states of the model that is compressed, of the dense one, or of both.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormix.compression.fitting import Statistics, new_statistics, observe
from tensormix.compression.units import groups_of
from tensormix.methods.base import Method
from tensormix.sites import Site
from tensormix.sites.calls import Activations, Call, record_calls

Stream = Literal["propagated", "dense"]


@dataclass
class Calibration:
    """What methods with statistics see.

    `inputs` says what enters a block: "propagated", what the compressed blocks before it pass on, or "dense", what
    the dense ones do. A statistic that names a stream of its own gets that one.
    """

    batches: Iterable[Tensor] | None = None  # (B, T) each
    inputs: Stream = "propagated"
    precision: torch.dtype = torch.float64  # of the statistics
    activations: Activations = field(default_factory=Activations)


class Streams:
    """The hidden states that enter a block: of the compressed model, and of the dense one where that is asked for.

    What a block passes on takes the place of what entered it, batch by batch, so that there is one list of each.
    """

    def __init__(
        self, model: nn.Module, chosen: list[dict[str, Method]], calibration: Calibration, tidy: Callable[[], None]
    ) -> None:
        self.model, self.calibration, self.tidy = model, calibration, tidy
        self.asked = streams_of(chosen, calibration.inputs)
        self.calls: list[list[Call]] = record_calls(model, calibration.batches or (), self._keep_first)
        if not (self.calls and self.calls[0]):
            raise ValueError("there are no calibration batches: the iterable is empty")
        start = [call.hidden for call in self.calls[0]]
        for call in (call for of_block in self.calls for call in of_block):
            call.hidden = start[0]  # lets go of the others
        self.hidden: dict[str, list[Tensor]] = {stream: list(start) for stream in sorted(self.asked)}
        self._passed: set[str] = set()  # the streams that are behind the block already

    @property
    def separate(self) -> bool:
        """Whether the dense stream is needed for itself."""
        return "dense" in self.asked

    def observe(
        self, index: int, block: nn.Module, sites: Mapping[str, Site], here: Mapping[str, Method]
    ) -> Statistics:
        """Run the dense block on every stream; returns what the statistics of its sites saw."""
        groups = groups_of(self.model, sites, here).values()
        stats = new_statistics(sites, here, self.calibration.precision, groups)
        for stream in self.hidden:
            watched = {
                name: [
                    {k: s for k, s in of_expert.items() if _stream_of(k, self.calibration.inputs) == stream}
                    for of_expert in experts
                ]
                for name, experts in stats.items()
            }
            watched = {name: experts for name, experts in watched.items() if experts[0]}
            with observe(self.model, sites, watched):
                if stream == "dense" or not here:
                    self._pass_on(stream, index, block)
                elif watched:
                    for _ in self._run(stream, index, block):
                        pass
        return stats

    def advance(self, index: int, block: nn.Module) -> None:
        """Go on to the next block: every stream that did not pass while this one was dense."""
        for stream in self.hidden.keys() - self._passed:
            self._pass_on(stream, index, block)
        self._passed = set()

    def _pass_on(self, stream: str, index: int, block: nn.Module) -> None:
        for number, hidden in enumerate(self._run(stream, index, block)):
            self.hidden[stream][number] = self.calibration.activations.keep(hidden)
        self._passed.add(stream)

    def _run(self, stream: str, index: int, block: nn.Module) -> Iterator[Tensor]:
        for call, entering in zip(self.calls[index], self.hidden[stream], strict=True):
            yield call.run(block, entering)
            self.tidy()

    def _keep_first(self, hidden: Tensor) -> Tensor:
        self.tidy()
        return self.calibration.activations.keep(hidden)


def _stream_of(kind: Any, inputs: Stream) -> str:
    return inputs if kind.stream == "walk" else kind.stream


def streams_of(chosen: list[dict[str, Method]], inputs: Stream) -> set[str]:
    """Which streams of hidden states the statistics of these methods see."""
    return {_stream_of(kind, inputs) for here in chosen for method in here.values() for kind in method.needs}
