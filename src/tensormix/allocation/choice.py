"""One candidate for every region within a budget: the choice that the measured losses add up to least in.

What candidates lose alone is added up; what they lose together is measured for whole plans (`contest`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import fsum
from typing import Any

from tensormix.allocation.regions import Candidate, Region
from tensormix.fitting.divide import Option, SiteOptions
from tensormix.fitting.knapsack import MOST, optimal
from tensormix.plan import Plan, Rule

Losses = Mapping[Candidate, float]
Choice = dict[Region, Candidate]  # regions that are not in it stay dense


@dataclass(frozen=True, eq=False)
class Chosen:
    """A choice within a budget.

    Attributes:
        name: "auto" of all methods, the label of one alone, "uniform ..." of that at the same size everywhere.
        predicted: the sum of the losses of its candidates, each measured alone.
        bound: below this no choice of the same methods can be; equal to `predicted` where that is the optimum.
        is_uniform: whether it is the same size everywhere instead of the best choice.
    """

    name: str
    choice: Choice
    cost: int  # of all regions
    predicted: float
    bound: float
    is_uniform: bool = False


def best_choice(name: str, regions: Sequence[Region], losses: Losses, units: int, most: int = MOST) -> Chosen | None:
    """The choice with the least sum of losses among those that cost at most `units`; None if all cost more.

    Regions of one block are combined first, with the whole block as one more possibility, so that the blocks are lists
    of which one item each is taken: `optimal` then finds the best, and no further than `most` says there.
    """
    lists = [block_options(block, losses) for block in by_block(regions)]
    cost = sum(min(option.cost for option in listed.options) for listed in lists)
    if cost > units:
        return None
    found = optimal(lists, min(units, sum(listed.dense_cost for listed in lists)), most)
    choice: Choice = {region: taken for option in found.chosen.values() for region, taken in option.size}
    spent = sum(option.cost for option in found.chosen.values())
    return Chosen(name, choice, spent, found.error, found.bound)


def by_block(regions: Sequence[Region]) -> list[list[Region]]:
    blocks: dict[int, list[Region]] = {}
    for region in regions:
        blocks.setdefault(region.block, []).append(region)
    return list(blocks.values())


def block_options(regions: Sequence[Region], losses: Losses) -> SiteOptions:
    """All that the regions of one block could become together, without what costs more and loses no less.

    The size of an option is the choice that it is, as pairs.
    """
    combined = [Option((), 0, 0.0)]
    for region in (region for region in regions if not region.is_block):
        own = [Option((), region.dense_cost, 0.0), *_own(region, losses)]
        combined = _unbeaten(
            [Option(a.size + b.size, a.cost + b.cost, a.error + b.error) for a, b in product(combined, own)]
        )
    wholes = [option for region in regions if region.is_block for option in _own(region, losses)]
    dense = sum(region.dense_cost for region in regions if not region.is_block)
    return SiteOptions(f"block {regions[0].block}", dense, tuple(_unbeaten([*combined, *wholes])))


def _own(region: Region, losses: Losses) -> list[Option]:
    known = [candidate for candidate in region.candidates if candidate in losses]
    return [Option(((region, candidate),), candidate.cost, losses[candidate]) for candidate in known]


def _unbeaten(options: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def contestants(
    regions: Sequence[Region], losses: Losses, labels: Sequence[str], units: int, keep: float
) -> tuple[list[Chosen], list[str]]:
    """The best choice of all methods, of each one alone, and each one at the size `keep` everywhere, without repeats.

    The second list names the methods that cannot meet the budget alone. The first is empty if all together cannot.
    """
    found = [best_choice("auto", regions, losses, units)]
    alone: list[str] = []
    for label in labels:
        of_label = _only(losses, regions, lambda candidate, label=label: candidate.label == label)
        best = best_choice(label, regions, of_label, units)
        alone += [label] if best is None else []
        found += [best, _uniform(label, regions, of_label, units, keep)]
    different: dict[frozenset[Candidate], Chosen] = {}
    for chosen in found if found[0] is not None else ():
        if chosen is not None:
            different.setdefault(frozenset(chosen.choice.values()), chosen)
    return sorted(different.values(), key=lambda chosen: chosen.is_uniform), alone


def _only(losses: Losses, regions: Sequence[Region], wanted: Callable[[Candidate], bool]) -> Losses:
    return {c: losses[c] for region in regions for c in region.candidates if c in losses and wanted(c)}


def _uniform(label: str, regions: Sequence[Region], losses: Losses, units: int, keep: Any) -> Chosen | None:
    """One size in every region where the method has candidates; None if it has none of this size or it costs more."""
    choice = {
        region: candidate
        for region in regions
        for candidate in region.candidates
        if candidate in losses and candidate.size == keep and not region.is_block
    }
    own = [r for r in regions if not r.is_block and any(candidate in losses for candidate in r.candidates)]
    cost = sum(c.cost for c in choice.values()) + sum(
        region.dense_cost for region in regions if not region.is_block and region not in choice
    )
    if not choice or len(choice) < len(own) or cost > units:
        return None
    predicted = fsum(losses[candidate] for candidate in choice.values())
    return Chosen(f"uniform {label}", choice, cost, predicted, predicted, is_uniform=True)


def plan_of(choice: Choice) -> Plan:
    """Rules for what does not stay dense: one for all sites of a region that have one method."""
    rules = []
    for region, candidate in choice.items():
        if region.is_block:
            method = next(iter(candidate.methods.values()))
            rules.append(Rule(blocks=str(region.block), method=method))
            continue
        of_method: dict[Any, list[str]] = {}
        for name, method in candidate.methods.items():
            of_method.setdefault(method, []).append(re.escape(name))
        rules += [
            Rule(blocks=str(region.block), sites="|".join(names), method=method) for method, names in of_method.items()
        ]
    return Plan(tuple(rules))
