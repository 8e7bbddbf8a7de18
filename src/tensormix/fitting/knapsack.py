"""One option of every list within a budget, with the least sum of errors: the multiple-choice knapsack, exactly.

Shape letters: S states, each a choice for the lists so far, P options of one list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensormix.fitting.divide import Option, SiteOptions, by_spectrum, lower_bound, steps_of

MOST = 1 << 17  # states that are held at a time

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


class Optimum(NamedTuple):
    """The choice, the sum of its errors, and below what no choice within the budget can be."""

    chosen: dict[str, Option]
    error: float
    bound: float  # the error itself where the choice is the best; else that of the relaxation by Dantzig


class _States(NamedTuple):
    costs: Whole  # (S,) rising
    errors: Floats  # (S,) falling
    before: Whole  # (S,) the state that each goes on from
    taken: Whole  # (S,) the option of the last list


def optimal(sites: Sequence[SiteOptions], budget: int, most: int = MOST) -> Optimum:
    """The best choice of all, found list by list: Nemhauser and Ullmann 1969, with the bound of Dantzig 1957.

    After each list only the choices stay that no other beats in both cost and error, and of them those that may still
    end below the greedy choice (`by_spectrum`). Where more than `most` would stay, the greedy choice is returned with
    the bound that says how far it may be from the best.

    Raises ValueError as `by_spectrum` does.
    """
    greedy = by_spectrum(sites, budget)
    known = fsum(option.error for option in greedy.values())
    limit = known + 1e-12 * max(1.0, abs(known))  # sums in another order
    nothing = np.zeros(1, np.int64)
    walk = [_States(nothing, np.zeros(1), nothing, nothing)]
    for number, site in enumerate(sites):
        bound = _bound(sites[number + 1 :])
        states = _next(walk[-1], site.allowed, lambda costs, bound=bound: bound(budget - costs), limit)
        if not 0 < len(states.costs) <= most:
            return Optimum(greedy, known, lower_bound(sites, budget))
        walk.append(states)
    place, chosen = int(walk[-1].errors.argmin()), {}
    for site, states in zip(reversed(sites), reversed(walk[1:]), strict=True):
        chosen[site.name] = site.allowed[int(states.taken[place])]
        place = int(states.before[place])
    error = fsum(option.error for option in chosen.values())
    if error > known:  # equal but for the order of sums
        chosen, error = greedy, known
    return Optimum({site.name: chosen[site.name] for site in sites}, error, error)


def _next(states: _States, options: Sequence[Option], rest: Callable[[Whole], Floats], limit: float) -> _States:
    """Every state with every option (S, P), without those that cannot be part of the best."""
    costs = (states.costs[:, None] + np.array([option.cost for option in options], dtype=np.int64)).ravel()
    errors = (states.errors[:, None] + np.array([option.error for option in options])).ravel()
    places = np.flatnonzero(errors + rest(costs) <= limit)
    places = places[np.lexsort((errors[places], costs[places]))]
    least = np.minimum.accumulate(errors[places]) if len(places) else errors[places]
    better = np.concatenate([[True], least[1:] < least[:-1]])[: len(places)]
    places = places[better]
    return _States(costs[places], errors[places], places // len(options), places % len(options))


def _bound(sites: Sequence[SiteOptions]) -> Callable[[Whole], Floats]:
    """Room -> the error below which nothing that fits there can be; infinite where nothing fits."""
    least, error, steps = steps_of(sites, sum(site.dense_cost for site in sites))
    rooms = np.cumsum([least, *(cost for _, cost in steps)])
    errors = error - np.cumsum([0.0, *(gain * cost for gain, cost in steps)])

    def bound(room: Whole) -> Floats:
        return np.where(room >= least, np.interp(room, rooms, errors), np.inf)

    return bound
