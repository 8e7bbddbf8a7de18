"""Every candidate measured alone: what the model loses when one region is replaced and all else is dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tensormix.allocation.regions import Candidate, Region
from tensormix.allocation.rises import Rise, Rises
from tensormix.compression.observing import observe
from tensormix.compression.units import Statistics, Unit, at_sites
from tensormix.sites import Site, install
from tensormix.sites.calls import Activations
from tensormix.sites.fused_experts import is_fused
from tensormix.sites.installing import install_owners, remove_owner
from tensormix.sites.through import Blocks, through

Losses = dict[Candidate, Rise]


@torch.no_grad()
def compete(
    model: nn.Module,
    regions: Sequence[Region],
    batches: Sequence[Tensor],
    rises: Rises,
    precision: torch.dtype,
    activations: Activations,
    tell: Callable[[str], None],
) -> Losses:
    """One pass over the dense model: statistics of each block once for all candidates, then each of them fitted, put
    in its place, measured by `rises`, and taken out again.

    A candidate that cannot be fitted is no candidate any more; its region says why. `tell` is told of each by the name
    of its region.

    Raises ValueError, naming the site, if a weight or an input is not finite.
    """
    losses: Losses = {}
    sites = {site.name: site for region in regions for site in region.sites}
    last = max((region.block for region in regions if region.candidates), default=-1)
    for part in through(model, Blocks(), batches, activations.keep):
        (block,) = part.span
        here = [region for region in regions if region.block == block]
        units = [unit for region in here for candidate in region.candidates for unit in candidate.units]
        stats = _shared_statistics(units, precision)
        with observe(model, sites, stats):
            part.pass_on("dense")
        for unit in units:
            unit.check(stats)
        for region in here:
            for candidate in list(region.candidates):
                try:
                    losses[candidate] = _measured(model, region, candidate, stats, rises)
                except ValueError as reason:
                    region.candidates.remove(candidate)
                    region.refused[candidate.label, candidate.size] = str(reason)
                tell(region.name)
        if block == last:
            break
    return losses


def _shared_statistics(units: Sequence[Unit], precision: torch.dtype) -> Statistics:
    """Of each site one of every kind that a unit needs there."""
    stats: Statistics = {}
    for unit in units:
        for name, experts in unit.new_statistics(precision).items():
            shared = stats.setdefault(name, [{} for _ in experts])
            for known, new in zip(shared, experts, strict=True):
                for kind, statistic in new.items():
                    known.setdefault(kind, statistic)
    return stats


def _measured(model: nn.Module, region: Region, candidate: Candidate, stats: Statistics, rises: Rises) -> Rise:
    operators: dict[str, nn.Module] = {}
    moved: set[str] = set()  # the sites whose biases the operators take over
    for unit in candidate.units:
        fitted = unit.fit({name: stats[name] for name in unit.needs()})
        operators |= fitted.operators
        moved |= set(fitted.operators) if unit.moves_bias else set()
    with replaced(model, {site.name: site for site in region.sites}, operators, moved):
        return rises.at(region.block)


@contextmanager
def replaced(
    model: nn.Module, sites: Mapping[str, Site], operators: Mapping[str, nn.Module], moved: set[str]
) -> Iterator[None]:
    """While open, the operators stand at their sites, their owners where they belong; then the model is as it was."""
    places: dict[str, nn.Module] = {}  # name -> what stood there
    for name in operators:
        parent = name.rpartition(".")[0]
        if is_fused(model.get_submodule(parent)):  # installing opens the experts
            places[parent] = model.get_submodule(parent)
        elif name in sites:
            places[name] = model.get_submodule(name)
    placed = install_owners(model, operators)
    try:
        for name, (operator, _) in at_sites(operators).items():
            install(model, name, operator, move_bias=name in moved)
        yield
    finally:
        for name, module in places.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        for name in placed:
            remove_owner(model, name)
