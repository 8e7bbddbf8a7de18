"""Budgets of a method that slices the residual stream: one width for the whole model, found by what all of it costs.

A head that was tied to the embedding becomes a matrix of its own, and shortcuts come into the blocks: both are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor
from typing import Any

from torch import nn

from tensormix.allocation.outcome import Allocation, ImpossibleBudget, cost_of_model, impossible, total_row
from tensormix.compression.slicing import slice_empty
from tensormix.models import ModelSource
from tensormix.plan import Plan, Rule
from tensormix.rows import Row
from tensormix.settings import Budget
from tensormix.sites.sliced import check_sliceable

KEYS = {"bits": "bits", "parameters": "parameters", "macs": "macs_per_token"}


def allocate_width(source: ModelSource, plan: Plan, budget: Budget, empty: Callable[[], Any]) -> Allocation:
    """The largest width of the sliced stream with which the model costs no more than the budget allows.

    `empty` gives the model on meta, anew each time. Raises ImpossibleBudget if the narrowest costs more, ValueError if
    the budget is of something that is counted over sites only, or divided by anything but "uniform".
    """
    method, model = plan.whole, empty()
    if budget.of not in KEYS or budget.by != "uniform":
        raise ValueError(
            f"budget: {method.name} has one width for the whole model: only by 'uniform', and of {', '.join(KEYS)}; "
            f"got by {budget.by!r}, of {budget.of!r}"
        )
    full, key = check_sliceable(model), KEYS[budget.of]
    keeps = [*(width / full for width in range(method.multiple, full, method.multiple)), 1.0]
    rows_at = {keep: _Rows(empty, method.sized(keep)) for keep in keeps}
    sites = sum(row[f"dense_{key}"] for row in rows_at[1.0]())
    whole = sites if budget.over == "sites" else cost_of_model(model, budget.of, source)
    outside = max(0, whole - sites)
    units = floor(budget.keep * (1 + 2**-50) * whole) - outside
    low, high = -1, len(keeps) - 1  # the last that is known to fit, and the last that may
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(row[key] for row in rows_at[keeps[middle]]()) <= units
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < 0:
        least = sum(row[key] for row in rows_at[keeps[0]]()) + outside
        raise ImpossibleBudget(impossible(budget, least / whole))
    keep = keeps[low]
    rows = [_row(row, key, keep) for row in rows_at[keep]()]
    sized = Plan((Rule(method=method.sized(keep)),))
    return Allocation(sized, [total_row(budget, whole, units + outside, outside, rows), *rows])


class _Rows:
    """What every part of the model costs at one width, before and after; counted when it is first asked for."""

    def __init__(self, empty: Callable[[], nn.Module], method: Any) -> None:
        self.empty, self.method, self.rows = empty, method, []

    def __call__(self) -> list[Row]:
        self.rows = self.rows or slice_empty(self.empty(), self.method)
        return self.rows


def _row(row: Row, key: str, keep: float) -> Row:
    same = {name: row[name] for name in ("site", "block", "role", "method")}
    costs = {"cost": row[key], "dense_cost": row[f"dense_{key}"]}
    return {
        "kind": "size",
        **same,
        "size": keep,
        "setting": "keep_channels",
        **costs,
        "error": None,
        "importance": None,
    }
