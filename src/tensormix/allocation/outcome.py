"""What a budget came to: the plan with all sizes and its rows, or the sentence that says it cannot be met."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from torch import nn

from tensormix.allocation.survey import Found
from tensormix.fitting.divide import Option
from tensormix.methods.base import Method
from tensormix.models import ModelSource
from tensormix.plan import Plan, Rule
from tensormix.profile import num_parameters
from tensormix.rows import Row
from tensormix.settings import Budget
from tensormix.sites import macs_per_token
from tensormix.storage.bits import stored_bits


class ImpossibleBudget(ValueError):
    """No choice of sizes costs so little."""


@dataclass(frozen=True)
class Allocation:
    """A plan with all sizes, and the rows that say how it came about.

    `others` has every plan that was measured whole, by the name of the contender, where methods competed.
    """

    plan: Plan
    rows: list[Row]
    others: Mapping[str, Plan] = field(default_factory=dict)


def total_row(budget: Budget, whole: int, asked: int, outside: int, rows: list[Row]) -> Row:
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


def site_row(item: Found, option: Option) -> Row:
    method = item.methods.get(option.size)
    return {
        "kind": "size",
        "site": item.site.name,
        "block": item.site.block,
        "role": item.site.role,
        "method": "dense" if method is None else method.name,
        "size": None if option.size == "whole" else option.size,
        "setting": _setting(method, option.size),
        "cost": option.cost,
        "dense_cost": item.options.dense_cost,
        "error": option.error,
        "importance": item.importance,
        "importance_error": item.importance_error,
    }


def _setting(method: Method | None, size: Any) -> str | None:
    if method is None or method.size is None:
        return None
    inner = getattr(method, "of", None)
    return method.setting_of(size) if inner is None else f"of.{inner.setting_of(size)}"


def sized_plan(found: Sequence[Found], chosen: Mapping[str, Option]) -> Plan:
    """One rule for each site that does not stay dense."""
    rules = []
    for item in found:
        method = item.methods.get(chosen[item.site.name].size)
        if method is not None:
            sites = None if item.site.kind == "block" else re.escape(item.site.name)
            rules.append(Rule(blocks=str(item.site.block), sites=sites, method=method))
    return Plan(tuple(rules))


def cost_of_model(model: nn.Module, of: str, source: ModelSource) -> int:
    stored = source.stored_bits or stored_bits(model)
    if of == "bytes_per_token":
        raise ValueError("budget: bytes_per_token is counted over sites only, not over the model; leave out over")
    return {"bits": stored, "parameters": num_parameters(model), "macs": macs_per_token(model)}[of]


def check_possible(found: Sequence[Found], budget: Budget, units: int, outside: int, whole: int) -> None:
    """Raise ValueError with the smallest and the largest `keep` that can be met."""
    sites = whole - outside
    if budget.by == "uniform":
        share, tightest = max((i.options.allowed[0].cost / i.options.dense_cost, i.site.name) for i in found)
        least, because = share * sites, f"; {tightest} is what cannot be smaller"
    else:
        least, because = sum(item.options.allowed[0].cost for item in found), ""
    if units < least:
        raise ImpossibleBudget(impossible(budget, (least + outside) / whole) + because)


def impossible(budget: Budget, least: float) -> str:
    smallest = ceil(least * 1e4) / 1e4
    return (
        f"budget: keep={budget.keep} of the {budget.of} of the {budget.over} cannot be met; the smallest possible "
        f"is {smallest}, the largest 1"
    )
