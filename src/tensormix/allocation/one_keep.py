"""Budgets of methods that change the layers of a block together: one `keep` for all blocks, found by what it costs."""

from __future__ import annotations

from torch import nn

from tensormix.compression import Home
from tensormix.compression.kinds import planned_units
from tensormix.plan import Plan
from tensormix.sites import Site, find_sites

STEPS = 256  # of `keep`


def is_joint(plan: Plan, by: str) -> bool:
    """Whether the plan has only methods that change layers together.

    Raises ValueError if it has some of both, or if such a plan is to be divided `by` anything but "uniform".
    """
    kinds = {rule.method.takes == "layers" for rule in plan.root}
    if len(kinds) > 1:
        names = sorted({rule.method.name for rule in plan.root})
        raise ValueError(
            f"budget: {', '.join(names)} cannot share one budget: some change layers together, some do not"
        )
    if kinds == {True} and by != "uniform":
        name = plan.root[0].method.name
        raise ValueError(f"budget: {name} divides its keep within each block by itself: only by 'uniform' among blocks")
    return kinds == {True}


def at_keep(plan: Plan, keep: float) -> Plan:
    rules = [rule.model_copy(update={"method": rule.method.model_copy(update={"keep": keep})}) for rule in plan.root]
    return Plan(tuple(rules))


def costs(model: nn.Module, home: Home, plan: Plan, of: str) -> dict[str, tuple[Site, int, int]]:
    """Site name -> the site, its dense cost, and what the plan leaves of it.

    Raises ValueError if the plan's sizes are not allowed somewhere.
    """
    sites = {site.name: site for site in find_sites(model)}
    left = {name: cost for unit in planned_units(model, plan) for name, cost in unit.costs().items()}
    dense = {name: site.cost(home.dense_bits(site)) for name, site in sites.items() if name in left}
    return {name: (sites[name], getattr(dense[name], of), getattr(left[name], of)) for name in dense}


def largest_keep(model: nn.Module, home: Home, plan: Plan, of: str, units: int) -> float | None:
    """The largest step of `keep` whose sites cost no more than `units` together; None if the smallest costs more."""

    def cost(step: int) -> int | None:
        try:
            return sum(left for _, _, left in costs(model, home, at_keep(plan, step / STEPS), of).values())
        except ValueError:  # some layer does not allow so little
            return None

    low, high = 0, STEPS
    while low < high:
        step = (low + high + 1) // 2
        needed = cost(step)
        low, high = (step, high) if needed is None or needed <= units else (low, step - 1)
    return low / STEPS if low and cost(low) is not None else None
