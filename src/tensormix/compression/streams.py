"""What enters the blocks: the hidden states of the model that is compressed, of the dense one, or of both.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormix.compression.observing import observe
from tensormix.compression.units import Statistics, Unit
from tensormix.methods.base import HiddenStates
from tensormix.sites import Site
from tensormix.sites.calls import Activations
from tensormix.sites.through import Part

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


def observe_part(
    model: nn.Module, part: Part, sites: Mapping[str, Site], units: Sequence[Unit], calibration: Calibration
) -> Statistics:
    """Run the dense blocks on every stream; returns what the statistics of their sites saw.

    The dense stream is behind the blocks afterwards; the others are not, unless nothing in the blocks will change.
    """
    part.enter()
    stats = {name: seen for unit in units for name, seen in unit.new_statistics(calibration.precision).items()}
    ends = [unit for unit in units if HiddenStates in unit.kinds]
    entering = list(part.hidden["dense"]) if ends else []
    for stream in part.hidden:
        watched = {
            name: [
                {k: s for k, s in of_expert.items() if _stream_of(k, calibration.inputs) == stream}
                for of_expert in experts
            ]
            for name, experts in stats.items()
        }
        watched = {name: experts for name, experts in watched.items() if experts[0]}
        with observe(model, sites, watched):
            if stream == "dense" or not units:
                part.pass_on(stream)
            elif watched:
                for _ in part.run(stream):
                    pass
    for unit in ends:
        runs = [call.run_in_its_dtype for call in part.calls["dense"][part.span[0]]]
        stats[unit.name] = [{HiddenStates: HiddenStates(runs, entering, list(part.hidden["dense"]))}]
    return stats


def _stream_of(kind: Any, inputs: Stream) -> str:
    return inputs if kind.stream == "walk" else kind.stream


def streams_of(units: Iterable[Unit], inputs: Stream) -> set[str]:
    """Which streams of hidden states the statistics of these units see."""
    return {_stream_of(kind, inputs) for unit in units for kinds in unit.needs().values() for kind in kinds}
