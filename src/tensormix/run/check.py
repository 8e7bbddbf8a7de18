"""What a recipe would do to a model, from its config alone: no weight is read and nothing is written."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensormix.allocation import WAYS, allocate
from tensormix.allocation.laser_search import candidates, most_evaluations, plan_of
from tensormix.compression.choosing import assume, chooses
from tensormix.compression.slicing import slice_empty
from tensormix.compression.units import groups_of
from tensormix.methods import METHODS, Method
from tensormix.methods.base import BlockMethod, LinearMethod
from tensormix.methods.slice_gpt import SliceGpt
from tensormix.models import skeleton
from tensormix.operators import ExpertStack
from tensormix.plan import Plan
from tensormix.profile import bytes_by_dtype, num_parameters
from tensormix.recipe import Recipe
from tensormix.sites import Site, blocks, cost_of, find_sites, install, macs_per_token, returns_tuple


def check(recipe: Recipe) -> dict[str, Any]:
    """Counts of the dense model, of the compressed one, and of every site that the plan replaces.

    Returns:
        {"dense": {"parameters", "macs_per_token", "bytes": {dtype: n}}, "compressed": {the same}, "sites": [rows],
        "assumed": whether something is left to the run: blocks that a rule leaves to measuring, of which the last that
        it could choose are counted then, or sizes that a budget decides from weights or inputs, where those of
        "uniform" are shown in their place, or what a search finds, where every site has its smallest candidate}. With
        a budget also "budget": the rows of `allocate`; with a search "search": how many candidates and evaluations.
        MACs are those of `macs_per_token`; bytes are parameters times the size of the dtype. "num_experts" in a row
        is None unless the site is a stack of experts.

    Raises:
        ValueError: the model has no config, or the plan does not fit it.
    """
    model = skeleton(recipe.model)
    dense, plan, found, assumed = counts(model), recipe.plan, {}, chooses(recipe.plan)
    if recipe.budget is not None:
        assumed = WAYS[recipe.budget.by].needs_weights
        uniform = recipe.budget.model_copy(update={"by": "uniform"})
        decided = allocate(recipe.model, plan, uniform, dtype=recipe.dtype)
        plan, found = decided.plan, {"budget": decided.rows}
    if recipe.search is not None:
        pairs, left_out = candidates(model, plan, recipe.search)
        smallest = {site: min(rate for other, rate in pairs if other == site) for site, _ in pairs}
        most = most_evaluations(pairs)
        found = {"search": {"candidates": len(pairs), "evaluations": most, "left_out": left_out}}
        plan, assumed = plan_of(model, smallest), True
    sites = replace_empty(model, plan)
    return {"dense": dense, "sites": sites, "compressed": counts(model), "assumed": assumed, **found}


def counts(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": num_parameters(model),
        "macs_per_token": macs_per_token(model),
        "bytes": bytes_by_dtype(model),
    }


def replace_empty(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Install empty operators where the plan wants them; one row per site, sizes as in the rows of `compress`."""
    if isinstance(plan.whole, SliceGpt):
        unknown = dict.fromkeys(("num_experts", "in_features", "out_features"))
        return [{**row, **unknown} for row in slice_empty(model, plan.whole)]
    sites = {site.name: site for site in find_sites(model)}
    num_blocks = len(blocks(model))
    chosen, rows = assume(plan, list(sites.values()), num_blocks).resolve(list(sites.values()), num_blocks), []
    joint = {name: op for group in groups_of(model, sites, chosen).values() for name, op in group.empty().items()}
    for name, method in chosen.items():
        site = sites[name]
        operator = joint[name] if name in joint else empty_operator(site, method, model)
        whole, cost, dense = site.kind == "block", cost_of(operator, site.experts_per_token), site.cost(0)
        rows.append(
            {
                "site": name,
                "block": site.block,
                "role": site.role,
                "method": method.name,
                "operator": type(operator).__name__,
                "num_experts": site.num_experts if site.kind == "experts" else None,
                "in_features": None if whole else site.in_features,
                "out_features": None if whole else site.out_features,
                "dense_parameters": dense.parameters,
                "parameters": cost.parameters,
                "dense_macs_per_token": dense.macs,
                "macs_per_token": cost.macs,
            }
        )
        install(model, name, operator)
    return rows


def empty_operator(site: Site, method: Method, model: Any) -> Any:
    if isinstance(method, BlockMethod):
        returns = "tuple" if returns_tuple(site.module) else "tensor"
        return method.empty(site.module, model.config.get_text_config().hidden_size, returns=returns)
    assert isinstance(method, LinearMethod)
    try:
        each = [method.empty(site.in_features, site.out_features) for _ in range(site.num_experts)]
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from error
    return ExpertStack.from_experts(each) if site.kind == "experts" else each[0]


def list_methods() -> list[dict[str, Any]]:
    """The table of methods as plain data."""
    return [
        {
            "name": name,
            "source": method.source,
            "sites": method.site,
            "needs": [statistic.__name__ for statistic in method.needs],
            "summary": method.summary,
        }
        for name, method in METHODS.items()
    ]
