"""The ways to divide a budget among sites: what each has to know of them, and who divides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tensormix.allocation.learned import Training, learned
from tensormix.allocation.survey import Found
from tensormix.fitting.divide import Option, by_sensitivity, by_spectrum, uniform
from tensormix.methods import METHODS
from tensormix.settings import Budget

Chosen = dict[str, Option]


@dataclass(frozen=True)
class Way:
    """How a budget is divided: what has to be known of each site, and who divides."""

    errors: Any  # what `Survey` asks for
    divide: Callable[[Sequence[Found], int], Chosen] | None  # None: the whole model is trained for it
    needs_weights: bool = True
    needs_whole_model: bool = False


def _uniform(found: Sequence[Found], units: int) -> Chosen:
    sites = [item.options for item in found]
    return uniform(sites, units / sum(site.dense_cost for site in sites))


def _marginal(found: Sequence[Found], units: int) -> Chosen:
    return by_spectrum([item.options for item in found], units)


def _weighted(found: Sequence[Found], units: int) -> Chosen:
    weights = {item.site.name: item.importance or 0.0 for item in found}
    chosen = by_sensitivity([item.options for item in found], units, weights)
    plain = {item.site.name: {o.size: o for o in item.options.options} for item in found}
    return {name: plain[name][option.size] for name, option in chosen.items()}  # errors as they were


WAYS: dict[str, Way] = {
    "uniform": Way("none", _uniform, needs_weights=False),
    "spectrum": Way("spectrum", _marginal),
    "greedy": Way("fits", _marginal),
    "sensitivity": Way("fits", _weighted, needs_whole_model=True),
    "learned": Way("none", None, needs_whole_model=True),
}


def train_ranks(
    model: nn.Module, batches: Sequence[Tensor], budget: Budget, found: Sequence[Found], units: int
) -> Chosen:
    """The ranks that training finds. Ranks whose scales go beyond the budget are taken back, from the dearest site."""
    methods = [next(iter(item.methods.values())) for item in found]
    odd = next((method for method in methods if method.learned_storage is None), None)
    if odd is not None:
        known = ", ".join(name for name, cls in METHODS.items() if "learned_storage" in vars(cls))
        raise ValueError(f"budget.by 'learned' divides the ranks of {known}, and the plan has {odd.name}")
    storages = {method.learned_storage for method in methods}
    if len(storages) > 1 or (storages == {"remapped"} and budget.of != "bits"):
        raise ValueError("budget.by 'learned' takes one storage for all sites, and with 'remapped' only of 'bits'")
    storage, names = "remapped" if storages == {"remapped"} else "plain", [item.site.name for item in found]
    full = 0.0  # what all numbers of the dense weights would cost as numbers of factors
    for item in found:
        sizes, first = (item.site.in_features, item.site.out_features), item.options.options[0]
        per_rank = max(sizes) if storage == "remapped" else sum(sizes)
        full += first.cost / first.size / per_rank * sizes[0] * sizes[1]
    training = Training(steps=budget.steps)
    ranks = learned(model, names, batches, min(units / full, 1.0), storage=storage, training=training)
    places = {
        item.site.name: max(
            i for i, o in enumerate(item.options.options) if i == 0 or (o.size or 0) in range(1, rank + 1)
        )
        for item, rank in zip(found, ranks.values(), strict=True)
    }
    options = {item.site.name: item.options.options for item in found}
    while sum(options[name][place].cost for name, place in places.items()) > units:
        dearest = max((name for name in places if places[name]), key=lambda name: options[name][places[name]].cost)
        places[dearest] -= 1
    return {name: options[name][place] for name, place in places.items()}
