"""What enters the blocks: the hidden states of the model that is compressed, of the dense one, or of both.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormix.compression.fitting import Statistics, new_statistics, observe
from tensormix.compression.units import groups_of
from tensormix.methods.base import Method
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
    model: nn.Module, part: Part, sites: Mapping[str, Site], here: Mapping[str, Method], calibration: Calibration
) -> Statistics:
    """Run the dense blocks on every stream; returns what the statistics of their sites saw.

    The dense stream is behind the blocks afterwards; the others are not, unless nothing in the blocks will change.
    """
    part.enter()
    stats = new_statistics(sites, here, calibration.precision, groups_of(model, sites, here).values())
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
            if stream == "dense" or not here:
                part.pass_on(stream)
            elif watched:
                for _ in part.run(stream):
                    pass
    return stats


def _stream_of(kind: Any, inputs: Stream) -> str:
    return inputs if kind.stream == "walk" else kind.stream


def streams_of(chosen: list[dict[str, Method]], inputs: Stream) -> set[str]:
    """Which streams of hidden states the statistics of these methods see."""
    return {_stream_of(kind, inputs) for here in chosen for method in here.values() for kind in method.needs}
