"""What a recipe would do to a model, from its config alone: no weight is read and nothing is written."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensormix.allocation.growth import growth
from tensormix.allocation.resolvers import foresee
from tensormix.compression.choosing import assume
from tensormix.compression.fitting import row_of
from tensormix.compression.kinds import units_of
from tensormix.compression.slicing import slice_empty
from tensormix.compression.units import at_sites
from tensormix.models import ModelSource, notes_on, skeleton
from tensormix.plan import Plan
from tensormix.profile import bytes_by_dtype, num_parameters
from tensormix.recipe import Recipe
from tensormix.sites import Site, blocks, find_sites, install, macs_per_token
from tensormix.sites.installing import install_owners
from tensormix.sites.sites import unknown_stacks


def check(recipe: Recipe) -> dict[str, Any]:
    """Counts of the dense model, of the compressed one, and of every site that the plan replaces.

    Returns:
        {"dense": {"parameters", "macs_per_token", "bytes": {dtype: n}}, "compressed": {the same}, "sites": [rows],
        "assumed": whether something is left to the run: blocks that a rule leaves to measuring, of which the last that
        it could choose are counted then, or sizes that a budget decides from weights or inputs, where those of
        "uniform" are shown in their place, or what a search finds, where every site has its smallest candidate}. With
        a budget also "budget": the rows of `allocate`; with a search "search": how many candidates and evaluations.
        Where something has to be known of the source, "notes" says it.
        Where the compressed model is larger than the dense one, "larger" is a sentence about it.
        MACs are those of `macs_per_token`; bytes are parameters times the size of the dtype. "num_experts" in a row
        is None unless the site is a stack of experts.

    Raises:
        ValueError: the model has no config, or the plan does not fit it.
    """
    source = ModelSource(recipe.model)
    model = skeleton(source)
    notes = notes_of(recipe, source, model)
    dense, foreseen = counts(model), foresee(recipe, source, model)
    sites = replace_empty(model, foreseen.plan)
    compressed = counts(model)
    larger = growth(dense["parameters"], compressed["parameters"], sites)
    beside = {} if larger is None else {"larger": larger}
    return {
        "dense": dense, "sites": sites, "compressed": compressed, "assumed": foreseen.is_assumed, **foreseen.beside,
        **({"notes": notes} if notes else {}),
        **beside,
    }  # fmt: skip


def notes_of(recipe: Recipe, source: ModelSource, model: Any) -> list[str]:
    """What has to be known before the recipe is run, a sentence each; `model` is the skeleton of the source."""
    return notes_on(source, model) + _unknown_stacks(model) + _long_windows(recipe, model)


def _unknown_stacks(model: Any) -> list[str]:
    found = unknown_stacks(model)
    count = sum(model.get_parameter(name).numel() for name in found)
    return [] if not found else [
        f"{count:,} numbers in {len(found)} stacks of experts, such as {found[0]}, stay dense: how a "
        f"{type(model).__name__} multiplies them is not known here"
    ]  # fmt: skip


def _long_windows(recipe: Recipe, model: Any) -> list[str]:
    """What a recipe wants to read in longer windows than the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    windows = {
        "calibration": recipe.calibration and recipe.calibration.window,
        "recover": recipe.recover and recipe.recover.window,
        **{f"evaluate.perplexity[{number}]": one.window for number, one in enumerate(recipe.evaluate.perplexity)},
    }
    return [
        f"{name} reads windows of {window} tokens, and the model was made for {limit}: beyond them it is not itself"
        for name, window in windows.items()
        if window and limit and window > limit
    ]


def counts(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": num_parameters(model),
        "macs_per_token": macs_per_token(model),
        "bytes": bytes_by_dtype(model),
    }


def replace_empty(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Install empty operators where the plan wants them; one row per site, sizes as in the rows of `compress`."""
    if plan.whole is not None:
        return [{**row, **_sizes(None)} for row in slice_empty(model, plan.whole)]
    sites = {site.name: site for site in find_sites(model)}
    num_blocks = len(blocks(model))
    chosen = assume(model, plan).resolve(list(sites.values()), num_blocks)
    rows = {}
    for unit in units_of(model, sites, chosen):
        operators = unit.empty()
        install_owners(model, operators)
        for name, (operator, owners) in at_sites(operators).items():
            rows[name] = {**row_of(unit, name, operator, sites[name].cost(0), {}, owners), **_sizes(sites[name])}
            install(model, name, operator)
    return [{key: value for key, value in rows[name].items() if "bits" not in key} for name in chosen]


def _sizes(site: Site | None) -> dict[str, Any]:
    if site is None or site.kind == "block":
        return dict.fromkeys(("num_experts", "in_features", "out_features"))
    return {
        "num_experts": site.num_experts if site.kind == "experts" else None,
        "in_features": site.in_features,
        "out_features": site.out_features,
    }
