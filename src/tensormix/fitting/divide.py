"""One budget for many sites: which site gets which size.

A site is a list of options, each with a cost and an error; an allocation picks one per site, so that the costs stay
within the budget and the sum of the errors is small. Costs are whole numbers of one unit, the same for all sites: bits,
parameters, multiply-accumulates per token, bytes per decoded token. `keep` is always a fraction of the dense cost.

Shape letters: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from math import ceil, floor, fsum, isfinite
from typing import Any, NamedTuple, TypeVar

Key = TypeVar("Key")
_UNROUND = 1 + 2**-50  # undoes the rounding of a fraction: 0.29 * 200 is 57.99999999999999 in fp64


class Option(NamedTuple):
    """One thing that a site could become."""

    size: Any  # a rank, a number of branches or of bits; None is the dense weight
    cost: int
    error: float


@dataclass(frozen=True)
class SiteOptions:
    """What one site could become: each option costs more than the one before it and has no larger error.

    Raises ValueError, naming the site, if that does not hold, if a cost is no whole number up to the dense one, if an
    error is not finite, or if no option reaches the floor.
    """

    name: str
    dense_cost: int
    options: tuple[Option, ...] = ()
    floor: float = 0.0  # fraction of the dense cost below which no option is chosen
    excluded: bool = False  # stays dense, at its dense cost, whatever the options

    def __post_init__(self) -> None:
        for size, cost, error in [Option(None, self.dense_cost, 0.0), *self.options]:
            if not isinstance(cost, int) or not 0 <= cost <= self.dense_cost or self.dense_cost == 0:
                known = f"a whole number up to the dense cost of {self.dense_cost}"
                raise ValueError(f"{self.name}: the cost of size {size} must be {known}, got {cost!r}")
            if not isfinite(error):
                raise ValueError(f"{self.name}: the error of size {size} must be finite, got {error}")
        for cheap, dear in pairwise(self.options):
            if dear.cost <= cheap.cost or dear.error > cheap.error:
                raise ValueError(f"{self.name}: costs must rise and errors must not, but {dear} follows {cheap}")
        if not self.allowed:
            most = self.options[-1].cost / self.dense_cost if self.options else 0
            found = f"no option reaches the floor of {self.floor}, the dearest keeps {most:.4f}"
            raise ValueError(f"{self.name}: {found}; set excluded to leave the site dense")

    @property
    def allowed(self) -> tuple[Option, ...]:
        """The options that may be chosen; the dense weight alone if the site is excluded."""
        if self.excluded:
            return (Option(None, self.dense_cost, 0.0),)
        return tuple(option for option in self.options if option.cost * _UNROUND >= self.floor * self.dense_cost)


def low_rank(
    name: str,
    spectrum: Iterable[float],
    in_features: int,
    out_features: int,
    *,
    relative: bool,  # errors are divided by the error of rank 0, if that is not zero
    cost_per_number: int = 1,  # 16 counts bits in bfloat16, 1 parameters, or MACs per token
    granularity: int = 1,  # ranks are multiples of it
    or_dense: bool = False,  # the last option is the dense weight, which makes the list non-convex
) -> SiteOptions:
    """Every rank R whose R (I + O) numbers cost no more than the dense weight; the error is sum_{i>R} s_i^2, convex.

    `spectrum` holds the singular values s from the largest on: of W, or of W S with S S^T = X X^T for the error on
    calibration inputs; values that are not given count as zero. Raises ValueError if one is negative, not finite or
    out of order, or if no rank is left.
    """
    values, dense, per_rank = [float(v) for v in spectrum], in_features * out_features, in_features + out_features
    if not all(isfinite(value) and value >= 0 for value in values) or any(b > a for a, b in pairwise(values)):
        raise ValueError(f"{name}: singular values must be finite, not negative, and from the largest on")
    largest = (dense - or_dense) // per_rank
    if not 1 <= granularity <= largest:
        pays = f"rank {largest} is the largest that pays in a {in_features}x{out_features} layer"
        raise ValueError(f"{name}: {pays}, granularity must be from 1 to that, got {granularity}; or exclude the site")
    tails = [0.0, *accumulate(value * value for value in reversed(values))][::-1]  # small numbers first: no loss
    scale = tails[0] if relative and tails[0] > 0 else 1.0
    options = [
        Option(rank, rank * per_rank * cost_per_number, tails[min(rank, len(values))] / scale)
        for rank in range(granularity, largest + 1, granularity)
    ]
    options += [Option(None, dense * cost_per_number, 0.0)] * or_dense
    return SiteOptions(name, dense * cost_per_number, tuple(options))


def measured(name: str, dense_cost: int, points: Mapping[Any, tuple[int, float]]) -> SiteOptions:
    """Any family of operators: size -> (cost, error), in any order. Raises ValueError as `SiteOptions` does."""
    options = (Option(size, cost, error) for size, (cost, error) in points.items())
    return SiteOptions(name, dense_cost, tuple(sorted(options, key=lambda option: option.cost)))


def budget_of(sites: Sequence[SiteOptions], keep: float) -> int:
    """What `keep` of the dense cost of all sites is, excluded ones included. Raises ValueError if not 0 < keep <= 1."""
    return floor(_check_keep(keep) * _UNROUND * _dense_cost(sites))


def uniform(sites: Sequence[SiteOptions], keep: float) -> dict[str, Option]:
    """The same fraction at every site that is not excluded, such that `keep` of the cost of all sites stays.

    Each gets its dearest option within that fraction; what rounding leaves over is not passed on. Raises ValueError if
    a site has no option that is cheap enough.
    """
    total, free = _dense_cost(sites), [site for site in sites if not site.excluded]
    free_cost = sum(site.dense_cost for site in free)
    share = (_check_keep(keep) * _UNROUND * total - (total - free_cost)) / free_cost
    least, tightest = max((site.allowed[0].cost / site.dense_cost, site.name) for site in free)
    if share < least:
        least = _up((least * free_cost + total - free_cost) / total)
        raise ValueError(f"keep={keep} is too little for {tightest}: the smallest possible is {least}, the largest 1")
    return {s.name: [o for o in s.allowed if s.excluded or o.cost / s.dense_cost <= share][-1] for s in sites}


def by_spectrum(sites: Sequence[SiteOptions], budget: int) -> dict[str, Option]:
    """From the cheapest options on, always the step that lowers the error most per cost; of equal ones the first site.

    Marginal analysis (Fox 1966) on the lower convex hull of each list (Shoham and Gersho 1988). At the end no option
    with a smaller error fits at any site. The sum of errors is the optimum if the lists are convex and all steps cost
    the same (equal I + O, one granularity), and if the budget is used up before a step does not fit. It is always as
    good as the optimum of any budget that is smaller by the dearest step on the hulls; `lower_bound` says what is left.

    Raises ValueError if the budget is below the cost of the cheapest options or above the dense cost.
    """
    hulls, room = _start(sites, budget)
    # sorted, and so a heap
    queue = sorted((-_gain(hull[-1], hull[-2]), place) for place, hull in enumerate(hulls) if len(hull) > 1)
    while queue:
        hull = hulls[place := heappop(queue)[1]]
        step = hull[-2].cost - hull[-1].cost
        if step <= room:
            room -= step
            hull.pop()
        else:  # options between the two may fit
            hull = hulls[place] = _hull(sites[place].allowed, hull[-1], room)
        if len(hull) > 1:
            heappush(queue, (-_gain(hull[-1], hull[-2]), place))
    return {site.name: hull[-1] for site, hull in zip(sites, hulls, strict=True)}


def by_sensitivity(sites: Sequence[SiteOptions], budget: int, importance: Mapping[str, float]) -> dict[str, Option]:
    """`by_spectrum` with errors times the importance of their site; the options returned have these errors.

    Importance is, for instance, the angle of the site's block or a measured rise of the loss. Raises ValueError as
    `by_spectrum`, and if an importance is missing, belongs to no site, or is not positive and finite.
    """
    _check_positive(importance)
    if odd := sorted({site.name for site in sites} ^ set(importance)):
        raise ValueError(f"importance must name every site and nothing else; the first that differs is {odd[0]!r}")
    weigh = {site.name: [o._replace(error=o.error * importance[site.name]) for o in site.options] for site in sites}
    return by_spectrum([replace(site, options=tuple(weigh[site.name])) for site in sites], budget)


def lower_bound(sites: Sequence[SiteOptions], budget: int) -> float:
    """No choice within the budget has a smaller sum of errors, up to rounding: the optimum if the one step that does
    not fit could be taken in part (Dantzig 1957). Raises ValueError as `by_spectrum` does."""
    room = _start(sites, budget)[1]
    _, error, steps = steps_of(sites, room)
    for gain, cost in steps:
        error -= gain * min(cost, room)
        room -= min(cost, room)
    return error


def steps_of(sites: Sequence[SiteOptions], room: int) -> tuple[int, float, list[tuple[float, int]]]:
    """The cost and the error of the cheapest options together, and every step on the hulls of what costs at most
    `room` more, the best first: how much error each unit of its cost saves, and its cost."""
    hulls = [_hull(site.allowed, site.allowed[0], room) for site in sites]
    steps = [(_gain(cheap, dear), dear.cost - cheap.cost) for hull in hulls for dear, cheap in pairwise(hull)]
    cheapest = [hull[-1] for hull in hulls]
    return sum(o.cost for o in cheapest), fsum(o.error for o in cheapest), sorted(steps, reverse=True)


def iprs(importance: Mapping[Key, float], keep: float) -> dict[Key, float]:
    """The fraction of each block that stays: in proportion to its importance, and 1 where that would exceed 1.

    arXiv 2505.23966: w = min(1, c t), with c such that the weights sum to keep times their number. The blocks are taken
    to cost the same. A block of weight 1 is meant to be left dense.
    Raises ValueError if there are no blocks, an importance is not positive and finite, or not 0 < keep <= 1.
    """
    _check_positive(importance)
    active, room = dict(importance), _check_keep(keep) * len(importance)
    while active:
        total = fsum(active.values())
        weights = {key: room * (value / total) for key, value in active.items()}
        active = {key: importance[key] for key, weight in weights.items() if weight <= 1}
        if len(active) == len(weights):
            return {key: weights.get(key, 1.0) for key in importance}
        room -= len(weights) - len(active)
    return dict.fromkeys(importance, 1.0)


def _hull(options: Sequence[Option], first: Option, room: int) -> list[Option]:
    """The lower convex hull of error over cost, from `first` to the best that `room` more buys; cheapest last."""
    hull: list[Option] = []
    for option in options:
        if not 0 <= option.cost - first.cost <= room or (hull and option.error >= hull[-1].error):
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull[::-1]


def _gain(cheap: Option, dear: Option) -> float:
    """How much error one unit of cost saves between the two."""
    return (cheap.error - dear.error) / (dear.cost - cheap.cost)


def _start(sites: Sequence[SiteOptions], budget: int) -> tuple[list[list[Option]], int]:
    """The hulls, each ending with its cheapest option, and what these options leave of the budget."""
    largest, smallest = _dense_cost(sites), sum(site.allowed[0].cost for site in sites)
    if not smallest <= budget <= largest:
        least = f"{smallest} (keep={_up(smallest / largest)})"
        raise ValueError(f"a budget of {budget} cannot be met: it must be from {least} to {largest} (keep=1)")
    return [_hull(site.allowed, site.allowed[0], budget - smallest) for site in sites], budget - smallest


def _dense_cost(sites: Sequence[SiteOptions]) -> int:
    if all(site.excluded for site in sites):
        raise ValueError("there is nothing to allocate: " + ("every site is excluded" if sites else "no sites given"))
    if twice := [name for name, other in pairwise(sorted(site.name for site in sites)) if name == other]:
        raise ValueError(f"every site must be there once, but {twice[0]} is there more often")
    return sum(site.dense_cost for site in sites)


def _up(keep: float) -> float:
    return ceil(keep / _UNROUND * 1e4) / 1e4


def _check_keep(keep: float) -> float:
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the fraction of the dense cost that stays, above 0 and at most 1, got {keep}")
    return keep


def _check_positive(importance: Mapping[Any, float]) -> None:
    if not importance:
        raise ValueError("importance is empty: it needs a number for each site or block")
    for key, value in importance.items():
        if not (isfinite(value) and value > 0):
            raise ValueError(f"importance must be positive and finite, got {value} for {key!r}")
