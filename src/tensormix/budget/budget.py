"""One budget for a whole plan: every method that has a size gets one at each site, as a plan that holds them.

The outcome is plain data: `compress` knows nothing of budgets, and a plan that was decided once can be run again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.allocate import Option, by_sensitivity, by_spectrum, uniform
from tensormix.budget.joint import STEPS, at_keep, costs, is_joint, largest_keep
from tensormix.budget.learned import Training, learned
from tensormix.budget.sensitivity import weigher
from tensormix.budget.survey import Found, Survey
from tensormix.methods import DobiSvd
from tensormix.methods.base import LinearMethod, Method
from tensormix.models import fill_buffers, load_model, local_folder, skeleton
from tensormix.plan import Plan, Rule
from tensormix.profile import num_parameters
from tensormix.settings import Budget
from tensormix.sites import Site, find_sites, macs_per_token
from tensormix.sites.calls import Activations
from tensormix.storage.assembly import Assembly
from tensormix.storage.bits import checkpoint_bits, stored_bits
from tensormix.storage.checkpoint import Checkpoint
from tensormix.streaming.disk import Source
from tensormix.walk import Calibration, Home, Progress

Row = dict[str, Any]
Chosen = dict[str, Option]


class ImpossibleBudget(ValueError):
    """No choice of sizes costs so little."""


@dataclass(frozen=True)
class Allocation:
    """A plan with all sizes, and the rows that say how it came about."""

    plan: Plan
    rows: list[Row]


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


@dataclass(frozen=True)
class Way:
    """How a budget is divided: what has to be known of each site, and who divides."""

    errors: Any  # what `Survey` asks for
    divide: Callable[[Sequence[Found], int], Chosen] | None  # None: the whole model is trained for it
    needs_weights: bool = True
    needs_whole_model: bool = False


WAYS: dict[str, Way] = {
    "uniform": Way("none", _uniform, needs_weights=False),
    "spectrum": Way("spectrum", _marginal),
    "greedy": Way("fits", _marginal),
    "sensitivity": Way("fits", _weighted, needs_whole_model=True),
    "learned": Way("none", None, needs_whole_model=True),
}


def allocate(
    model: str | Path,
    plan: Plan,
    budget: Budget,
    batches: Iterable[Tensor] | None = None,
    progress: Progress | None = None,
    *,
    dtype: str = "auto",
    precision: torch.dtype = torch.float64,
    spill: Path | None = None,
    device: str = "cpu",
) -> Allocation:
    """The sizes of all sites of `plan` within `budget`, from the files of `model`, which are read block by block.

    Only two hold the whole model in memory: "sensitivity" measures what each site alone does to the logits, and
    "learned", for the ranks of dobi_svd, trains all of them together (see `tensormix.learned`).

    Args:
        batches: token ids (B, T) for calibration; with them the errors of "greedy" are those on the inputs.
        dtype: that the compressed model will have; "auto" is that of the checkpoint.
        spill: a folder for the activations between blocks.

    Raises:
        ImpossibleBudget: the budget cannot be met; the sentence has the smallest and the largest possible.
        ValueError: a weight or an input is not finite or all zero (it names the site), or the way to divide needs
            what is not there.
    """
    joint = is_joint(plan)
    if joint and budget.by != "uniform":
        name = plan.root[0].method.name
        raise ValueError(f"budget: {name} divides its keep within each block by itself: only by 'uniform' among blocks")
    way, batches = WAYS[budget.by], None if batches is None else list(batches)
    options: dict[str, Any] = {
        "of": budget.of,
        "errors": way.errors,
        "levels": budget.levels,
        "with_inputs": batches is not None,
    }
    if way.needs_whole_model:
        whole: Any = load_model(model, dtype=dtype)
        whole.to(device)
        if way.divide is None:
            survey = Survey(whole, plan, _Counted(model, dtype), progress, **options)
            survey.look()
            return _decided(whole, plan, budget, survey, model, partial(_learned, whole, batches or [], budget))
        weigh = weigher(whole, batches or [], budget.measure)
        survey = Survey(whole, plan, _Counted(model, dtype), progress, **options, weigh=weigh, keep=budget.keep)
        survey.run(Calibration(batches, "dense", precision))
        return _decided(whole, plan, budget, survey, model)
    bare: Any = skeleton(model, dtype=dtype)
    home = _home(bare, model, device)
    if joint:
        return _joint(bare, home, plan, budget, model)
    survey = Survey(bare, plan, home, progress, **options)
    if way.needs_weights:
        if survey.last_observed >= 0:
            fill_buffers(bare, device)
        survey.run(Calibration(batches, "dense", precision, Activations(spill)))
    else:
        survey.look()
    return _decided(bare, plan, budget, survey, model)


class _Counted(Home):
    """The blocks are in the model; what their weights take is asked of the files, which may have packed them."""

    def __init__(self, source: str | Path, dtype: str) -> None:
        bare: Any = skeleton(source, dtype=dtype)
        self.files = _home(bare, source, "cpu")
        self.sites = {site.name: site for site in find_sites(bare)}

    def dense_bits(self, site: Site) -> int:
        return self.files.dense_bits(self.sites[site.name])


def _home(model: nn.Module, folder: str | Path, device: str) -> Home:
    """The files of the checkpoint; a folder with nothing but a config is enough to count."""
    path = local_folder(folder)
    if not any(path.glob("*.safetensors")):
        return Home()
    return Source(model, Assembly(model, Checkpoint(path)), device)


def _learned(model: nn.Module, batches: Sequence[Tensor], budget: Budget, found: Sequence[Found], units: int) -> Chosen:
    """The ranks that training finds. Ranks whose scales go beyond the budget are taken back, from the dearest site."""
    methods = [next(iter(item.methods.values())) for item in found]
    odd = next((method for method in methods if not isinstance(method, DobiSvd)), None)
    if odd is not None:
        raise ValueError(f"budget.by 'learned' divides the ranks of dobi_svd, and the plan has {odd.name}")
    storages = {method.storage for method in methods if isinstance(method, DobiSvd)}
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


def _decided(
    model: nn.Module, plan: Plan, budget: Budget, survey: Survey, source: str | Path,
    divide: Callable[[Sequence[Found], int], Chosen] | None = None,
) -> Allocation:  # fmt: skip
    found = [survey.found[name] for name in survey.sites if name in survey.found]
    sites = sum(item.options.dense_cost for item in found)
    whole = sites if budget.over == "sites" else _cost_of_model(model, budget.of, source)
    outside = whole - sites
    units = floor(budget.keep * (1 + 2**-50) * whole) - outside
    _check_possible(found, budget, units, outside, whole)
    divide = divide or WAYS[budget.by].divide
    assert divide is not None
    chosen = divide(found, units)
    rows = [_site_row(item, chosen[item.site.name]) for item in found]
    return Allocation(_plan(found, chosen), [_total(budget, whole, units + outside, outside, rows), *rows])


def _total(budget: Budget, whole: int, asked: int, outside: int, rows: list[Row]) -> Row:
    achieved = outside + sum(row["cost"] for row in rows)
    return {
        "kind": "budget",
        "of": budget.of,
        "over": budget.over,
        "by": budget.by,
        "keep": budget.keep,
        "dense": whole,
        "asked": asked,
        "achieved": achieved,
        "achieved_keep": achieved / whole,
        "error": sum(row["error"] or 0.0 for row in rows),
    }


def _joint(model: nn.Module, home: Home, plan: Plan, budget: Budget, source: str | Path) -> Allocation:
    """One `keep` for all blocks. Where ranks depend on the data, the costs are those of equal spectra."""
    dense = costs(model, home, at_keep(plan, 1.0), budget.of)
    sites = sum(before for _, before, _ in dense.values())
    whole = sites if budget.over == "sites" else _cost_of_model(model, budget.of, source)
    units = floor(budget.keep * (1 + 2**-50) * whole) - (whole - sites)
    keep = largest_keep(model, home, plan, budget.of, units)
    if keep is None:
        least = next(
            k for k in (step / STEPS for step in range(1, STEPS + 1)) if _allowed(model, home, plan, k, budget.of)
        )
        smallest = sum(left for _, _, left in costs(model, home, at_keep(plan, least), budget.of).values())
        raise ImpossibleBudget(_impossible(budget, (smallest + whole - sites) / whole))
    sized = at_keep(plan, keep)
    after = costs(model, home, sized, budget.of)
    rows = [
        {
            "kind": "size",
            "site": name,
            "block": site.block,
            "role": site.role,
            "method": plan.root[0].method.name,
            "size": keep,
            "setting": "keep",
            "cost": left,
            "dense_cost": before,
            "error": None,
            "importance": None,
        }
        for name, (site, before, left) in after.items()
    ]
    return Allocation(sized, [_total(budget, whole, units + whole - sites, whole - sites, rows), *rows])


def _allowed(model: nn.Module, home: Home, plan: Plan, keep: float, of: str) -> bool:
    try:
        costs(model, home, at_keep(plan, keep), of)
    except ValueError:
        return False
    return True


def _site_row(item: Found, option: Option) -> Row:
    method = item.methods.get(option.size)
    return {
        "kind": "size",
        "site": item.site.name,
        "block": item.site.block,
        "role": item.site.role,
        "method": "dense" if method is None else method.name,
        "size": None if option.size == "whole" else option.size,
        "setting": _setting(method),
        "cost": option.cost,
        "dense_cost": item.options.dense_cost,
        "error": option.error,
        "importance": item.importance,
    }


def _setting(method: Method | None) -> str | None:
    if not isinstance(method, LinearMethod):
        return None
    inner = getattr(method, "of", None)
    return method.size if inner is None else f"of.{inner.size}"


def _plan(found: Sequence[Found], chosen: Chosen) -> Plan:
    """One rule for each site that does not stay dense."""
    rules = []
    for item in found:
        method = item.methods.get(chosen[item.site.name].size)
        if method is not None:
            sites = None if item.site.kind == "block" else re.escape(item.site.name)
            rules.append(Rule(blocks=str(item.site.block), sites=sites, method=method))
    return Plan(tuple(rules))


def _cost_of_model(model: nn.Module, of: str, source: str | Path) -> int:
    folder = local_folder(source)
    stored = checkpoint_bits(folder) if any(folder.glob("*.safetensors")) else stored_bits(model)
    if of == "bytes_per_token":
        raise ValueError("budget: bytes_per_token is counted over sites only, not over the model; leave out over")
    return {"bits": stored, "parameters": num_parameters(model), "macs": macs_per_token(model)}[of]


def _check_possible(found: Sequence[Found], budget: Budget, units: int, outside: int, whole: int) -> None:
    """Raise ValueError with the smallest and the largest `keep` that can be met."""
    sites = whole - outside
    if budget.by == "uniform":
        share, tightest = max((i.options.allowed[0].cost / i.options.dense_cost, i.site.name) for i in found)
        least, because = share * sites, f"; {tightest} is what cannot be smaller"
    else:
        least, because = sum(item.options.allowed[0].cost for item in found), ""
    if units < least:
        raise ImpossibleBudget(_impossible(budget, (least + outside) / whole) + because)


def _impossible(budget: Budget, least: float) -> str:
    smallest = ceil(least * 1e4) / 1e4
    return (
        f"budget: keep={budget.keep} of the {budget.of} of the {budget.over} cannot be met; the smallest possible "
        f"is {smallest}, the largest 1"
    )
