"""What makes a plan whole that leaves something open: sizes, or which sites at all. One line for each way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tensormix.allocation.allocate import allocate
from tensormix.allocation.laser_search import candidates, most_evaluations, plan_of, scorer, search_sites
from tensormix.allocation.ways import WAYS
from tensormix.compression.choosing import assume, chooses
from tensormix.models import ModelSource
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.rows import Row


class Data(NamedTuple):
    """What a resolver may look at. Each part is made when it is asked for."""

    source: ModelSource  # of the dense model
    batches: Callable[[], Any]  # token ids (B, T) each, or None
    tokenizer: Callable[[], Any]
    dense: Callable[[], Any]  # the whole model in memory
    progress: Callable[[int, int], None]
    spill: Path  # a folder for activations
    device: str


class Resolved(NamedTuple):
    """The whole plan, the rows that say how it came about, and what is said beside them."""

    plan: Plan
    rows: list[Row]
    beside: Row


class Foreseen(NamedTuple):
    """A plan to count with when no weight is read; whether it may differ from the resolved one."""

    plan: Plan
    is_assumed: bool
    beside: Row


class Resolver(NamedTuple):
    """One way to make a plan whole. `resolve` is None where the walk does it itself, before its first block."""

    is_asked: Callable[[Recipe], bool]
    resolve: Callable[[Recipe, Data], Resolved] | None
    foresee: Callable[[Recipe, ModelSource, nn.Module], Foreseen]


def _budget(recipe: Recipe, data: Data) -> Resolved:
    settings = recipe.calibration
    assert recipe.budget is not None
    found = allocate(
        recipe.start or data.source,
        recipe.plan,
        recipe.budget,
        data.batches(),
        lambda done, total, _: data.progress(done, total),
        dtype=recipe.dtype,
        inputs="propagated" if settings is None else settings.inputs,
        precision=torch.float64 if settings is None else getattr(torch, settings.precision),
        spill=data.spill if settings is not None and settings.spill else None,
        device=data.device,
    )
    return Resolved(found.plan, found.rows, {})


def _budget_foreseen(recipe: Recipe, source: ModelSource, model: nn.Module) -> Foreseen:
    assert recipe.budget is not None
    uniform = recipe.budget.model_copy(update={"by": "uniform"})
    decided = allocate(source, recipe.plan, uniform, dtype=recipe.dtype)
    is_assumed = WAYS[recipe.budget.by].needs_weights or recipe.plan.choice is not None
    return Foreseen(decided.plan, is_assumed, {"budget": decided.rows})


def _search(recipe: Recipe, data: Data) -> Resolved:
    assert recipe.search is not None
    score, scored_on = scorer(data.tokenizer(), recipe.evaluate, recipe.search.part)
    found = search_sites(data.dense(), recipe.plan, recipe.search, score, data.progress)
    return Resolved(
        found.plan, found.rows, {"chosen": found.chosen, "scored_on": scored_on, "left_out": found.left_out}
    )


def _search_foreseen(recipe: Recipe, source: ModelSource, model: nn.Module) -> Foreseen:
    assert recipe.search is not None
    pairs, left_out = candidates(model, recipe.plan, recipe.search)
    smallest = {site: min(rate for other, rate in pairs if other == site) for site, _ in pairs}
    beside = {"candidates": len(pairs), "evaluations": most_evaluations(pairs), "left_out": left_out}
    return Foreseen(plan_of(model, recipe.plan, smallest), True, {"search": beside})


def _blocks_foreseen(recipe: Recipe, source: ModelSource, model: nn.Module) -> Foreseen:
    return Foreseen(assume(model, recipe.plan), True, {})


RESOLVERS: dict[str, Resolver] = {
    "budget": Resolver(lambda recipe: recipe.budget is not None, _budget, _budget_foreseen),
    "search": Resolver(lambda recipe: recipe.search is not None, _search, _search_foreseen),
    "blocks": Resolver(lambda recipe: chooses(recipe.plan), None, _blocks_foreseen),
}


def resolve(recipe: Recipe, data: Data) -> Resolved:
    """The plan of a recipe that leaves sizes or sites open. Raises ValueError as its resolver does."""
    work = next(r.resolve for r in RESOLVERS.values() if r.resolve is not None and r.is_asked(recipe))
    return work(recipe, data)


def foresee(recipe: Recipe, source: ModelSource, model: nn.Module) -> Foreseen:
    """A plan to count with, from the shapes of a skeleton alone. Raises ValueError if the plan does not fit it."""
    asked = [resolver.foresee(recipe, source, model) for resolver in RESOLVERS.values() if resolver.is_asked(recipe)]
    return asked[0] if asked else Foreseen(recipe.plan, False, {})
