"""Many runs of one recipe that differ in blocks and method; one folder per cell, and the boundary found.

    sweep.json        settings, the list of cells, the boundaries of what is finished
    dense/            the run of the untouched model, depth 0 of every series
    family/NAME/      runs of other dense models, for the trend of loss against parameters
    teacher/          the dense model's logits for recovery by distillation, until the last cell is done
    last-04-mixt4/    a cell: last 4 blocks, MixT with 4 branches

Every cell starts from the same dense model and gets the same recovery. A sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tensormix.allocation.resolvers import foresee
from tensormix.diagnose import Measurement, bisect_boundary
from tensormix.models import Sources, skeleton
from tensormix.recipe import Cell, Recipe, Sweep
from tensormix.rows import STAGES, SweepProgress
from tensormix.run.check import replace_empty
from tensormix.run.keys import dense_recipe, is_done, stage_keys
from tensormix.run.run import run_recipe
from tensormix.sites import blocks
from tensormix.storage.files import environment, now, write_json
from tensormix.storage.locks import only_process
from tensormix.sweep.boundaries import boundary_rows, cell_row, labels, measurement
from tensormix.sweep.family import family_rows, run_family


def cell_recipe(recipe: Recipe, cell: Cell) -> Recipe:
    """The sweep's recipe with the plan of one cell; everything else is the same in all cells."""
    sites = recipe.plan.root[0].sites if recipe.plan.root else None
    return recipe.model_copy(update={"plan": cell.plan_at(sites)})


def run_sweep(sweep: Sweep, folder: Path, *, progress: SweepProgress | None = None) -> Path:
    """Make every cell that is missing, find the boundaries, write sweep.json; returns `folder`.

    Raises:
        ValueError: a depth beyond the model, a size that a layer does not allow, another process writes into the
            folder, or whatever a stage of a cell finds wrong. Finished cells stay.
    """
    tell = progress or (lambda what, done, total: None)
    job = _Sweep(sweep, folder)
    if sweep.search == "scan":  # bisection may never come to its deepest cell
        job.check_sizes()
    with only_process(folder):
        run_family(sweep, folder)
        (job.bisect if sweep.search == "bisect" else job.scan)(tell)
        shutil.rmtree(folder / "teacher", ignore_errors=True)
    return folder


class _Sweep:
    """The cells of one sweep: which there are, and how one of them is made."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        assert sweep.recipe is not None  # Sweep.load and its validator see to it
        self.sweep, self.recipe, self.folder, self.dense = sweep, sweep.recipe, folder, folder / "dense"
        self.sources = Sources()
        self.num_blocks = len(blocks(skeleton(self.sources[self.recipe.model])))
        self.cells = sweep.cells(self.num_blocks)

    def check_sizes(self) -> None:
        """Empty operators for the deepest cell of every series: a size that is impossible is said before any cell."""
        deepest = {cell.series: cell for cell in sorted(self.cells, key=lambda cell: cell.depth)}
        source = self.sources[self.recipe.model]
        for cell in deepest.values():
            model = skeleton(source)
            try:
                replace_empty(model, foresee(cell_recipe(self.recipe, cell), source, model).plan)
            except ValueError as reason:
                raise ValueError(f"{cell.name}: {reason}") from None

    def make(self, name: str, recipe: Recipe, progress: Callable[[str, int, int], None] | None = None) -> None:
        run_recipe(
            recipe,
            self.folder / name,
            reference=None if name == "dense" else self.dense,
            progress=progress,
            keep_compressed=False,
            teacher_cache=self.folder / "teacher",
            sources=self.sources,
        )

    def recipe_of(self, cell: Cell) -> Recipe:
        recipe = cell_recipe(self.recipe, cell)
        start = self._start(cell)
        return recipe if start is None else recipe.model_copy(update={"start": str(start)})

    def _start(self, cell: Cell) -> Path | None:
        """With warm starts: the recovered model of the deepest cell of the same series before this one."""
        if not self.sweep.warm_start or self.recipe.recover is None:
            return None
        before = [c for c in self.cells if c.series == cell.series and set(c.blocks) < set(cell.blocks)]
        deepest = max(before, key=lambda c: c.depth, default=None)
        return self.folder / deepest.name / "recovered" if deepest else None

    def scan(self, tell: SweepProgress) -> None:
        """Every cell that is missing."""
        write_sweep(self.sweep, self.cells, self.folder)
        cells = sorted(self.cells, key=lambda c: c.depth) if self.sweep.warm_start else self.cells
        costs = {cell.name: cost(cell, self.num_blocks) for cell in cells}
        todo: dict[str, Cell | None] = {}
        # Whether a cell is finished can be asked once the dense run is: its key is part of theirs.
        dense = dense_recipe(self.recipe)
        if not (self.dense / "evaluate.json").exists() or not finished(dense, self.dense, None, self.sources):
            todo["dense"] = None
        for cell in cells:
            start = self._start(cell)
            known = (self.dense / "evaluate.json").exists() and (start is None or start.exists())
            where = self.folder / cell.name
            if not known or not finished(self.recipe_of(cell), where, self.dense, self.sources):
                todo[cell.name] = cell
        total, done = sum(costs.get(name, 0.3) for name in todo), 0.0
        for name, cell in todo.items():
            weight = costs.get(name, 0.3)
            job = self.recipe_of(cell) if cell else dense_recipe(self.recipe)
            begun = within(lambda share, n=name, d=done, w=weight: tell(n, d + w * share, total), shares_of(job))
            self.make(name, job, begun)
            done += weight
            tell(name, done, total)
            write_sweep(self.sweep, self.cells, self.folder)

    def bisect(self, tell: SweepProgress) -> None:
        """Of each series only the cells that finding its boundary takes; those not made are not in sweep.json."""
        series = list(dict.fromkeys(cell.series for cell in self.cells))
        total = len(series) * (math.ceil(math.log2(self.num_blocks)) + 3.0)  # more for a gradual fall
        made: list[Cell] = []
        self.make("dense", dense_recipe(self.recipe))
        for number, of_series in enumerate(series):
            members = {cell.depth: cell for cell in self.cells if cell.series == of_series}
            seen: dict[int, Measurement] = {}

            def measure(depth: int, members=members, seen=seen) -> Measurement:
                name = members[depth].name if depth else "dense"
                if depth:
                    self.make(name, self._judged(cell_recipe(self.recipe, members[depth]), seen, max(members)))
                    made.append(members[depth])
                    write_sweep(self.sweep, made, self.folder)
                found = measurement(self.folder / name, depth)
                assert found is not None  # the sweep was checked to have an exam
                seen[depth] = found
                tell(name, min(len(made), total), total)
                return found

            bisect_boundary(measure, max(members))
            tell(f"series {number + 1}", min(len(made), total), total)
        made.sort(key=lambda cell: self.cells.index(cell))
        write_sweep(self.sweep, made, self.folder)
        tell("boundary", total, total)

    def _judged(self, recipe: Recipe, seen: dict[int, Measurement], deepest: int) -> Recipe:
        """The recipe with the threshold of early stopping, once both ends of the series are known."""
        stop = recipe.recover.early_stop if recipe.recover else None
        if recipe.recover is None or stop is None:
            return recipe
        ends = [seen.get(0), seen.get(deepest)]
        known = [end.accuracy for end in ends if end is not None]
        stop = None if len(known) < 2 else stop.model_copy(update={"threshold": sum(known) / 2})
        return recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"early_stop": stop})})


def cost(cell: Cell, num_blocks: int) -> float:
    """Work of a cell in units of one dense recovery: a block that is gone costs little, a compressed one nearly all."""
    gone = 0.8 if cell.label in ("zero", "drop_blocks") else 0.0
    return 1.0 - gone * cell.depth / num_blocks


def shares_of(recipe: Recipe) -> dict[str, float]:
    """Roughly what part of a cell's time each stage takes, to move the bar between two cells."""
    budget, is_choice = recipe.budget, recipe.plan.choice is not None
    measures = budget is not None and (budget.by in ("sensitivity", "learned") or is_choice)
    rough = dict.fromkeys(STAGES, 0.0) | {"evaluate": 1.0}
    rough |= {"allocate": 3.0 if measures else 0.5, "compress": 1.0} if len(recipe.plan.root) else {}
    rough |= {"recover": 8.0} if recipe.recover is not None else {}
    rough |= {"diagnose": 0.5} if recipe.diagnose is not None else {}
    rough |= {"profile": 0.5} if recipe.profile is not None else {}
    whole = sum(rough.values())
    return {stage: part / whole for stage, part in rough.items()}


def within(tell: Callable[[float], None], shares: Mapping[str, float]) -> Callable[[str, int, int], None]:
    """The progress of the stages of one cell as one share from 0 to 1, where each stage has its own of the time."""

    def progress(stage: str, done: int, total: int) -> None:
        before = sum(shares[s] for s in STAGES[: STAGES.index(stage)])
        tell(before + shares[stage] * done / max(total, 1))

    return progress


def finished(recipe: Recipe, folder: Path, reference: Path | None, sources: Sources) -> bool:
    if reference is not None and not (reference / "diagnose.json").exists() and recipe.diagnose is not None:
        return False
    keys = stage_keys(recipe, reference, sources)
    return all(is_done(folder, stage, keys) for stage in keys)


def write_sweep(sweep: Sweep, cells: Sequence[Cell], folder: Path) -> None:
    rows = [cell_row(cell) for cell in cells]
    place = {"depth": 0, "blocks": []}
    dense = {"cell": "dense", "folder": "dense", **place, **labels("dense", {}, "last")}
    write_json(
        folder / "sweep.json",
        {
            "settings": json.loads(sweep.model_dump_json(exclude={"base"})),
            "cells": [dense, *rows],
            "boundary": boundary_rows(cells, folder) + family_rows(sweep, folder, rows),
            "environment": environment(),
            "finished": now() if all((folder / row["folder"] / "evaluate.json").exists() for row in rows) else None,
        },
    )
