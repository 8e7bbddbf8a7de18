"""What a sweep says about its cells and its series: the rows of sweep.json."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tensormix.diagnose import Measurement, find_boundary, fit_crossing
from tensormix.recipe import Cell
from tensormix.rows import Row
from tensormix.rows.labels import series, variant
from tensormix.run.keys import stage_rows


def cell_row(cell: Cell) -> Row:
    place = {"depth": cell.depth, "blocks": sorted(cell.blocks)}
    return {"cell": cell.name, "folder": cell.name, **place, **labels(cell.label, cell.settings, cell.direction)}


def labels(method: str, settings: dict[str, Any], direction: str) -> Row:
    """What tells the series of a sweep apart: the last two for people, `series` in full."""
    return {
        "direction": direction,
        "method": method,
        "num_branches": settings.get("num_branches"),
        "settings": settings,
        "variant": variant(method, settings),
        "series": series(method, settings, direction),
    }


def boundary_rows(cells: Sequence[Cell], folder: Path) -> list[Row]:
    """For each series the boundary of accuracy and the crossing of the drift, where its cells follow each other."""
    if not (folder / "dense" / "evaluate.json").exists():
        return []
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if (folder / cell.name / "evaluate.json").exists():
            found.setdefault(cell.series, []).append(cell)
    rows = []
    for members in found.values():
        if follow_each_other(members):
            rows += series_rows(sorted(members, key=lambda cell: cell.depth), folder)
    return rows


def follow_each_other(cells: Sequence[Cell]) -> bool:
    """Whether every cell holds the blocks of the shallower ones, so that depth is what they differ in."""
    ordered = sorted(cells, key=lambda cell: cell.depth)
    return all(set(before.blocks) < set(after.blocks) for before, after in pairwise(ordered))


def series_rows(members: Sequence[Cell], folder: Path) -> list[Row]:
    rows: list[Row] = []
    first = members[0]
    named = labels(first.label, first.settings, first.direction)
    start = measurement(folder / "dense", 0)
    found = [measurement(folder / cell.name, cell.depth) for cell in members]
    measured = [item for item in (start, *found) if item is not None]
    if start is not None and len(measured) >= 3:
        rows.append(find_boundary(measured).row(**named))
    drifts = {0: 0.0}
    for cell in members:
        if (drift := mean_drift(folder / cell.name)) is not None:
            drifts[cell.depth] = drift
    if len(drifts) >= 4:
        rows.append({**fit_crossing(list(drifts), list(drifts.values())).row(), **named})
    return rows


def measurement(folder: Path, depth: int) -> Measurement | None:
    for row in stage_rows(folder, "evaluate"):
        if row["kind"] == "accuracy" and row["subject"] == "all":
            return Measurement(depth=depth, accuracy=row["value"], num_questions=row["num_questions"])
    return None


def mean_drift(folder: Path) -> float | None:
    """The mean drift over all pairs of layers; None where it was not measured."""
    if not (folder / "diagnose.json").exists():
        return None
    means = [row for row in stage_rows(folder, "diagnose") if row["kind"] == "drift_mean" and row["region"] == "all"]
    return means[0]["value"] if means else None
