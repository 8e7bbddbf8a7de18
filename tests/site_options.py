"""Sites with options of every shape, and what the best choice among them is."""

from __future__ import annotations

from math import inf

import torch
from hypothesis import settings
from hypothesis import strategies as st

from tensormix.fitting.divide import Option, SiteOptions, low_rank, measured
from tensormix.operators import StructuredLinear

DENSE = 24
EQUAL_STEPS = ((8, 8), (6, 10), (12, 4))  # I + O is the same
FEW = settings(deadline=None, max_examples=60)

spectra = st.lists(st.integers(0, 9), max_size=6).map(lambda values: sorted(map(float, values), reverse=True))


@st.composite
def low_rank_sites(draw, shapes=EQUAL_STEPS, granularities=(1,)) -> list[SiteOptions]:
    granularity = draw(st.sampled_from(granularities))
    return [
        low_rank(f"s{place}", draw(spectra), *shape, relative=False, granularity=granularity)
        for place, shape in enumerate(draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=4)))
    ]


@st.composite
def any_sites(draw) -> list[SiteOptions]:
    """Costs and errors without any shape: most of these lists are not convex."""
    sites = []
    for place in range(draw(st.integers(1, 4))):
        costs = sorted(draw(st.sets(st.integers(0, DENSE), min_size=1, max_size=5)))
        errors = sorted(draw(st.lists(st.integers(0, 30), min_size=len(costs), max_size=len(costs))), reverse=True)
        points = {f"{cost}": (cost, float(error)) for cost, error in zip(costs, errors, strict=True)}
        sites.append(measured(f"s{place}", DENSE, points))
    return sites


def smallest(sites: list[SiteOptions]) -> int:
    return sum(site.allowed[0].cost for site in sites)


def any_budget(sites: list[SiteOptions]) -> st.SearchStrategy[int]:
    return st.integers(smallest(sites), sum(site.dense_cost for site in sites))


def cost_of(chosen: dict[str, Option]) -> int:
    return sum(option.cost for option in chosen.values())


def error_of(chosen: dict[str, Option]) -> float:
    return sum(option.error for option in chosen.values())


def optima(sites: list[SiteOptions], budget: int) -> list[float]:
    """The smallest sum of errors for every budget up to this one, by dynamic programming."""
    best = [0.0] * (budget + 1)
    for site in sites:
        options = site.allowed
        best = [
            min((best[room - o.cost] + o.error for o in options if o.cost <= room), default=inf)
            for room in range(budget + 1)
        ]
    return best


def squared(op: StructuredLinear, weight: torch.Tensor) -> float:
    return float((op.to_dense().detach() - weight).square().sum())


def assert_maximal(sites: list[SiteOptions], chosen: dict[str, Option], budget: int) -> None:
    """Within the budget, and no option with a smaller error fits at any one site."""
    assert list(chosen) == [site.name for site in sites]
    room = budget - cost_of(chosen)
    assert room >= 0
    for site in sites:
        now = chosen[site.name]
        assert now in site.allowed
        better = [o for o in site.allowed if o.error < now.error and o.cost - now.cost <= room]
        assert not better, f"{site.name}: {better[0]} fits into {room} more than {now}"
