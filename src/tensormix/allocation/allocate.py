"""One budget for a whole plan: every method that has a size gets one at each site, as a plan that holds them.

The outcome is plain data: `compress` knows nothing of budgets, and a plan that was decided once can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import floor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensormix.allocation.contest import Contest
from tensormix.allocation.one_keep import STEPS, at_keep, costs, is_joint, largest_keep
from tensormix.allocation.one_width import allocate_width
from tensormix.allocation.outcome import (
    Allocation,
    ImpossibleBudget,
    check_possible,
    cost_of_model,
    impossible,
    site_row,
    sized_plan,
    total_row,
)
from tensormix.allocation.sensitivity import weigher
from tensormix.allocation.survey import Found, Survey
from tensormix.allocation.ways import WAYS, Chosen, train_ranks
from tensormix.compression import Calibration, Home, Progress
from tensormix.compression.from_files import Source
from tensormix.compression.kinds import planned_units
from tensormix.compression.streams import Stream
from tensormix.models import ModelSource, fill_buffers, load_model, skeleton
from tensormix.plan import Plan
from tensormix.settings import Budget
from tensormix.sites import Site, find_sites
from tensormix.sites.batches import batches_of
from tensormix.sites.calls import Activations
from tensormix.storage.assembly import Assembly


def allocate(
    model: ModelSource | str | Path,
    plan: Plan | Any,
    budget: Budget,
    batches: Any = None,
    progress: Progress | None = None,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    inputs: Stream = "propagated",
    precision: torch.dtype = torch.float64,
    spill: Path | None = None,
    device: str = "cpu",
) -> Allocation:
    """The sizes of all sites of `plan` within `budget`, from the files of `model`, which are read block by block.

    Only three hold the whole model in memory: "sensitivity" measures what each site alone does to the logits,
    "learned", for dobi_svd, trains all ranks together (`tensormix.allocation.learned`), and the method `auto` measures
    candidates and whole plans (`tensormix.allocation.contest`), and holds it twice.

    Args:
        plan, batches, tokenizer: as in `compress`; with batches the errors of "greedy" are those on the inputs.
        dtype: that the compressed model will have; "auto" is that of the checkpoint.
        inputs: as in `compress`, for the plans that the method `auto` compares.
        spill: a folder for the activations between blocks.

    Raises:
        ImpossibleBudget: the budget cannot be met; the sentence has the smallest and the largest possible.
        ValueError: a weight or an input is not finite or all zero (it names the site), or the way to divide needs
            what is not there.
    """
    model, plan = ModelSource.of(model), Plan.of(plan)
    if plan.whole is not None:
        return allocate_width(model, plan, budget, partial(skeleton, model, dtype=dtype))
    if plan.choice is not None:
        return _contest(model, plan, budget, batches, tokenizer, dtype, inputs, precision, spill, device, progress)
    joint, bare = is_joint(plan, budget.by), skeleton(model, dtype=dtype)
    way, batches = WAYS[budget.by], None if batches is None else list(batches_of(bare, batches, tokenizer) or ())
    levels, given = budget.levels, batches is not None
    options: dict[str, Any] = {"of": budget.of, "errors": way.errors, "levels": levels, "with_inputs": given}
    if way.needs_whole_model:
        whole: Any = load_model(model, dtype=dtype)
        make_survey = partial(Survey, whole.to(device), plan, _Counted(model, dtype), progress, **options)
        return _measured_whole(make_survey, whole, Calibration(batches, "dense", precision), budget, model)
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
    return _decided(bare, budget, survey, model)


def _measured_whole(
    make_survey: Callable[..., Survey], model: nn.Module, calibration: Calibration, budget: Budget, source: ModelSource
) -> Allocation:
    """With the whole model in memory: its ranks trained together, or what each site alone does to it."""
    batches = list(calibration.batches or ())
    if WAYS[budget.by].divide is None:
        survey = make_survey()
        survey.look()
        return _decided(model, budget, survey, source, partial(train_ranks, model, batches, budget))
    survey = make_survey(weigh=weigher(model, batches, budget.measure, budget.tokens), keep=budget.keep)
    survey.run(calibration)
    return _decided(model, budget, survey, source)


def _contest(
    source: ModelSource, plan: Plan, budget: Budget, batches: Any, tokenizer: Any, dtype: str, inputs: Stream,
    precision: torch.dtype, spill: Path | None, device: str, progress: Progress | None,
) -> Allocation:  # fmt: skip
    """Of several methods; without batches what may come of it, as their costs are."""
    tell = progress or (lambda done, total, name: None)
    if batches is None:
        bare = skeleton(source, dtype=dtype)
        return Contest(bare, source, _home(bare, source, "cpu"), plan, budget, lambda: bare, tell).foreseen()

    def fresh() -> Any:
        model: Any = load_model(source, dtype=dtype)
        return model.to(device)

    whole = fresh()
    calibration = Calibration(list(batches_of(whole, batches, tokenizer) or ()), inputs, precision, Activations(spill))
    return Contest(whole, source, _Counted(source, dtype), plan, budget, fresh, tell).decided(calibration)


class _Counted(Home):
    """The blocks are in the model; what their weights take is asked of the files, which may have packed them."""

    def __init__(self, source: ModelSource, dtype: str) -> None:
        bare: Any = skeleton(source, dtype=dtype)
        self.files = _home(bare, source, "cpu")
        self.sites = {site.name: site for site in find_sites(bare)}

    def dense_bits(self, site: Site) -> int:
        return self.files.dense_bits(self.sites[site.name])


def _home(model: nn.Module, source: ModelSource, device: str) -> Home:
    """The files of the checkpoint; a folder with nothing but a config is enough to count."""
    return Source(model, Assembly(model, source.weights), device) if source.has_weights else Home()


def _decided(
    model: nn.Module, budget: Budget, survey: Survey, source: ModelSource,
    divide: Callable[[Sequence[Found], int], Chosen] | None = None,
) -> Allocation:  # fmt: skip
    found = [survey.found[name] for name in survey.sites if name in survey.found]
    sites = sum(item.options.dense_cost for item in found)
    whole = sites if budget.over == "sites" else cost_of_model(model, budget.of, source)
    outside = whole - sites
    units = floor(budget.keep * (1 + 2**-50) * whole) - outside
    check_possible(found, budget, units, outside, whole)
    divide = divide or WAYS[budget.by].divide
    assert divide is not None
    chosen = divide(found, units)
    rows = [site_row(item, chosen[item.site.name]) for item in found]
    return Allocation(sized_plan(found, chosen), [total_row(budget, whole, units + outside, outside, rows), *rows])


def _joint(model: nn.Module, home: Home, plan: Plan, budget: Budget, source: ModelSource) -> Allocation:
    """One `keep` for all blocks. Where ranks depend on the data, the costs are those of equal spectra."""
    planned_units(model, at_keep(plan, 1 / STEPS))  # a method that keeps everything relies on nothing
    dense = costs(model, home, at_keep(plan, 1.0), budget.of)
    sites = sum(before for _, before, _ in dense.values())
    whole = sites if budget.over == "sites" else cost_of_model(model, budget.of, source)
    units = floor(budget.keep * (1 + 2**-50) * whole) - (whole - sites)
    keep = largest_keep(model, home, plan, budget.of, units)
    if keep is None:
        least = next(
            k for k in (step / STEPS for step in range(1, STEPS + 1)) if _allowed(model, home, plan, k, budget.of)
        )
        smallest = sum(left for _, _, left in costs(model, home, at_keep(plan, least), budget.of).values())
        raise ImpossibleBudget(impossible(budget, (smallest + whole - sites) / whole))
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
    return Allocation(sized, [total_row(budget, whole, units + whole - sites, whole - sites, rows), *rows])


def _allowed(model: nn.Module, home: Home, plan: Plan, keep: float, of: str) -> bool:
    try:
        costs(model, home, at_keep(plan, keep), of)
    except ValueError:
        return False
    return True
