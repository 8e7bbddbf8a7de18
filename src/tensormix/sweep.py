"""Many runs of one recipe that differ in depth, direction and method; one folder per cell, and the boundary found.

    sweep.json        settings, the list of cells, the boundaries of what is finished
    dense/            the run of the untouched model, depth 0 of every series
    teacher/          the dense model's logits for recovery by distillation, until the last cell is done
    last-04-mixt4/    a cell: last 4 blocks, MixT with 4 branches

Every cell starts from the same dense model and gets the same recovery. A sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tensormix.diagnose import Measurement, find_boundary, fit_crossing
from tensormix.files import environment, now, write_json
from tensormix.methods import DropBlocks, Mixt, ZeroMethod
from tensormix.models import skeleton
from tensormix.plan import Plan, Rule
from tensormix.recipe import Cell, Recipe, Sweep
from tensormix.run import STAGES, dense_recipe, is_done, run_recipe, stage_keys, stage_rows
from tensormix.sites import blocks

Row = dict[str, Any]
Progress = Callable[[str, float, float], None]  # what is being done, work done, work in all

# Rough shares of one cell's time, only to move the bar between two cells.
SHARES = {"compress": 0.02, "recover": 0.78, "evaluate": 0.1, "diagnose": 0.05, "profile": 0.05}


def cell_name(cell: Cell) -> str:
    what = f"mixt{cell.num_branches}" if cell.method == "mixt" else cell.method
    return f"{cell.direction}-{cell.depth:02d}-{what}"


def cell_recipe(recipe: Recipe, cell: Cell) -> Recipe:
    """The sweep's recipe with the plan of one cell; everything else is the same in all cells."""
    template = recipe.plan.root[0] if recipe.plan.root else Rule(method=Mixt(num_branches=1))
    where = f"{cell.direction} {cell.depth}"
    if cell.method == "mixt":
        method = template.method.model_copy(update={"num_branches": cell.num_branches})
        rule = Rule(blocks=where, sites=template.sites, method=method)
    elif cell.method == "zero":
        rule = Rule(blocks=where, sites=template.sites, method=ZeroMethod())
    else:
        rule = Rule(blocks=where, method=DropBlocks())
    return recipe.model_copy(update={"plan": Plan((rule,))})


def run_sweep(sweep: Sweep, folder: Path, *, progress: Progress | None = None) -> Path:
    """Make every cell that is missing, find the boundaries, write sweep.json; returns `folder`.

    Raises:
        ValueError: a depth beyond the model, or whatever a stage of a cell finds wrong. Finished cells stay.
    """
    recipe = sweep.recipe
    assert recipe is not None  # Sweep.load and its validator see to it
    tell = progress or (lambda what, done, total: None)
    num_blocks = len(blocks(skeleton(recipe.model)))
    cells = sweep.cells(num_blocks)
    dense = folder / "dense"
    write_sweep(sweep, cells, folder)
    jobs: list[tuple[str, Recipe, Path | None, float]] = [("dense", dense_recipe(recipe), None, 0.3)]
    jobs += [(cell_name(cell), cell_recipe(recipe, cell), dense, cost(cell, num_blocks)) for cell in cells]
    # Whether a cell is finished can be asked once the dense run is: its key is part of theirs.
    todo = [
        job for job in jobs if not (dense / "evaluate.json").exists() or not finished(job[1], folder / job[0], job[2])
    ]
    total, done = sum(job[3] for job in todo), 0.0
    for name, job, reference, weight in todo:
        begun = within(lambda share, n=name, d=done, w=weight: tell(n, d + w * share, total))
        run_recipe(
            job,
            folder / name,
            reference=reference,
            progress=begun,
            keep_compressed=False,
            teacher_cache=folder / "teacher",
        )
        done += weight
        tell(name, done, total)
        write_sweep(sweep, cells, folder)
    shutil.rmtree(folder / "teacher", ignore_errors=True)
    return folder


def cost(cell: Cell, num_blocks: int) -> float:
    """Work of a cell in units of one dense recovery: a block that is gone costs little, a compressed one nearly all."""
    gone = 0.0 if cell.method == "mixt" else 0.8
    return 1.0 - gone * cell.depth / num_blocks


def within(tell: Callable[[float], None]) -> Callable[[str, int, int], None]:
    """The progress of the stages of one cell as one share from 0 to 1."""

    def progress(stage: str, done: int, total: int) -> None:
        before = sum(SHARES[s] for s in STAGES[: STAGES.index(stage)])
        tell(before + SHARES[stage] * done / max(total, 1))

    return progress


def finished(recipe: Recipe, folder: Path, reference: Path | None) -> bool:
    if reference is not None and not (reference / "diagnose.json").exists() and recipe.diagnose is not None:
        return False
    keys = stage_keys(recipe, reference)
    return all(is_done(folder, stage, keys) for stage in keys)


def write_sweep(sweep: Sweep, cells: Iterable[Cell], folder: Path) -> None:
    rows = [
        {"cell": cell_name(cell), "folder": cell_name(cell), **json.loads(cell.model_dump_json())} for cell in cells
    ]
    dense = {
        "cell": "dense",
        "folder": "dense",
        "depth": 0,
        "direction": "last",
        "method": "dense",
        "num_branches": None,
    }
    write_json(
        folder / "sweep.json",
        {
            "settings": json.loads(sweep.model_dump_json(exclude={"base"})),
            "cells": [dense, *rows],
            "boundary": boundary_rows(rows, folder),
            "environment": environment(),
            "finished": now() if all((folder / row["folder"] / "evaluate.json").exists() for row in rows) else None,
        },
    )


def boundary_rows(cells: list[Row], folder: Path) -> list[Row]:
    """For each series of cells (method, direction, branches) the boundary of accuracy and the crossing of the drift."""
    if not (folder / "dense" / "evaluate.json").exists():
        return []
    series: dict[tuple, list[Row]] = {}
    for cell in cells:
        if (folder / cell["folder"] / "evaluate.json").exists():
            series.setdefault((cell["method"], cell["direction"], cell["num_branches"]), []).append(cell)
    rows = []
    for (method, direction, branches), members in series.items():
        labels = {"method": method, "direction": direction, "num_branches": branches}
        start = measurement(folder / "dense", 0)
        found = [measurement(folder / cell["folder"], cell["depth"]) for cell in members]
        measured = [item for item in (start, *found) if item is not None]
        if start is not None and len(measured) >= 3:
            rows.append(find_boundary(measured).row(**labels))
        drifts = {0: 0.0}
        for cell in members:
            if (drift := mean_drift(folder / cell["folder"])) is not None:
                drifts[cell["depth"]] = drift
        if len(drifts) >= 4:
            rows.append({**fit_crossing(list(drifts), list(drifts.values())).row(), **labels})
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
