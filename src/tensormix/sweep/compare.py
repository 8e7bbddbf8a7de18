"""Many methods under the same budgets: one folder per cell, all from the same dense model.

    comparison.json       settings, the list of cells, what each of them stores and by how much it misses its budget
    dense/                the run of the untouched model
    svd_llm-0.5-s0/       a cell: the method with that label, half of the budget's unit kept, seed 0

Every cell sees the same calibration text and gets the same recovery. A comparison that was stopped goes on where it
was, and one that gets another method, budget or seed makes only the cells that are missing.
"""

from __future__ import annotations

import json
from pathlib import Path

from tensormix.allocation import ImpossibleBudget
from tensormix.models import Sources
from tensormix.recipe import Recipe
from tensormix.recipe.comparison import NULLS, ComparedCell, Comparison
from tensormix.rows import Row, SweepProgress
from tensormix.run.keys import dense_recipe, stage_rows, with_allocation
from tensormix.run.run import run_recipe
from tensormix.storage.bits import checkpoint_bits
from tensormix.storage.files import environment, now, read_json, write_json
from tensormix.storage.locks import only_process
from tensormix.sweep.depths import finished, shares_of, within


def run_comparison(comparison: Comparison, folder: Path, *, progress: SweepProgress | None = None) -> Path:
    """Make every cell that is missing and write comparison.json; returns `folder`.

    A budget that a method cannot meet is a cell without a run: the sentence why stands in comparison.json.

    Raises:
        ValueError: another process writes into the folder, or whatever a stage of a cell finds wrong. Finished cells
            stay.
    """
    recipe = comparison.recipe
    assert recipe is not None  # Comparison.load and its validator see to it
    tell: SweepProgress = progress or (lambda what, done, total: None)
    with only_process(folder):
        _make_cells(comparison, recipe, folder, tell)
    return folder


def _make_cells(comparison: Comparison, recipe: Recipe, folder: Path, tell: SweepProgress) -> None:
    cells, dense, impossible, sources = comparison.cells(), folder / "dense", {}, Sources()
    write_comparison(comparison, folder, impossible, sources)
    tell("dense", 0, len(cells) + 1)
    untouched = within(lambda share: tell("dense", share, len(cells) + 1), shares_of(dense_recipe(recipe)))
    run_recipe(dense_recipe(recipe), dense, progress=untouched, keep_compressed=False, sources=sources)
    todo = [cell for cell in cells if not is_finished(comparison.recipe_of(cell), folder / cell.name, dense, sources)]
    for done, cell in enumerate(todo):
        tell(cell.name, done, len(todo))
        job = comparison.recipe_of(cell)
        begun = within(lambda share, name=cell.name, begun=done: tell(name, begun + share, len(todo)), shares_of(job))
        try:
            where = folder / cell.name
            run_recipe(job, where, reference=dense, progress=begun, keep_compressed=False, sources=sources)
        except ImpossibleBudget as reason:
            impossible[cell.name] = str(reason)
        write_comparison(comparison, folder, impossible, sources)
    tell("done", len(todo), len(todo))
    write_comparison(comparison, folder, impossible, sources, ended=True)


def is_finished(recipe: Recipe, folder: Path, dense: Path, sources: Sources) -> bool:
    decided = with_allocation(recipe, folder, sources)
    return decided is not None and finished(decided, folder, dense, sources)


def write_comparison(
    comparison: Comparison, folder: Path, impossible: dict[str, str], sources: Sources, ended: bool = False
) -> None:
    assert comparison.recipe is not None
    stored = sources[comparison.recipe.model].stored_bits
    rows = [cell_row(comparison, cell, folder / cell.name, impossible.get(cell.name)) for cell in comparison.cells()]
    write_json(
        folder / "comparison.json",
        {
            "settings": json.loads(comparison.model_dump_json(exclude={"base"})),
            "dense": {"cell": "dense", "folder": "dense", "bits": stored},
            "cells": rows,
            "environment": environment(),
            "finished": now() if ended else None,
        },
    )


def cell_row(comparison: Comparison, cell: ComparedCell, folder: Path, impossible: str | None) -> Row:
    """What a cell was asked for and what it stores; numbers are None where it has not come so far.

    `achieved_keep` and `missed_by` are fractions of the dense cost in the unit of the budget; `bits` is everything that
    the model of the cell stores.
    """
    contender = comparison.contenders[cell.method]
    row: Row = {
        "cell": cell.name,
        "folder": cell.name,
        "label": cell.method,
        "method": contender.method.name,
        "null": contender.method.name in NULLS,
        "by": contender.by or comparison.by,
        "keep": cell.keep,
        "seed": cell.seed,
        "bits": None,
        "achieved_keep": None,
        "missed_by": None,
        "impossible": impossible,
    }
    if (folder / "allocate.json").exists() and (folder / "evaluate.json").exists():
        total = stage_rows(folder, "allocate")[0]
        row["achieved_keep"] = total["achieved_keep"]
        row["missed_by"] = total["achieved_keep"] - total["keep"]
        made = next((folder / name for name in ("recovered", "compressed") if (folder / name).exists()), None)
        row["bits"] = None if made is None else checkpoint_bits(made)
    return row


def comparison_rows(folder: Path) -> list[Row]:
    """One flat row per finished cell, the dense model first: what it stores, and everything that was measured."""
    content = read_json(folder / "comparison.json")
    rows = []
    for cell in [content["dense"], *content["cells"]]:
        run = folder / cell["folder"]
        if (run / "evaluate.json").exists():
            measured = {"cell": cell["cell"], **{k: v for k, v in cell.items() if k not in ("folder", "impossible")}}
            for row in stage_rows(run, "evaluate"):
                if row["kind"] in ("perplexity", "kl"):
                    measured[f"{row['kind']} {row['text']}"] = row["value"]
                elif row["kind"] == "accuracy" and row["subject"] == "all":
                    measured["accuracy"] = row["value"]
            latency = stage_rows(run, "profile") if (run / "profile.json").exists() else []
            for row in latency:
                if row["kind"] == "latency" and row["model"] == "compressed":
                    measured[f"speed at {row['tokens']} tokens"] = row["speedup"]
            rows.append({**measured, "environment": read_json(run / "evaluate.json")["environment"]})
    return rows
