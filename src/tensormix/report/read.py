"""Run and sweep folders -> plain data. Reads JSON files only; nothing is loaded, nothing is computed.

A run folder holds `recipe.json` and one `<stage>.json` per finished stage; a sweep folder holds `sweep.json`,
whose cells are run folders; a comparison folder `comparison.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensormix.rows import STAGES


class Row(dict[str, Any]):
    """One row of a stage; a key that is not there is an error in words."""

    def __missing__(self, key: str) -> Any:
        kind = f"a row of kind {self['kind']!r}" if "kind" in self else f"the row {json.dumps(self)[:200]}"
        raise ValueError(f"report: {kind} has no {key!r}; another version of tensormix wrote it: run its stage again")


@dataclass(frozen=True)
class Stage:
    """One `<stage>.json`."""

    rows: list[Row]
    environment: Any = None
    seconds: float | None = None
    finished: Any = None  # when the stage ended, as it was written


@dataclass(frozen=True)
class Run:
    """One run folder: its recipe, its finished stages, its dense reference."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    stages: dict[str, Stage]
    dense: Run | None = None

    def rows(self, stage: str, kind: str | None = None) -> list[Row]:
        """Rows of one stage (none if it has not finished), of one kind if asked."""
        rows = self.stages[stage].rows if stage in self.stages else []
        return [row for row in rows if kind is None or row["kind"] == kind]


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep; `run` is None where its folder has no recipe and no stage yet."""

    name: str
    depth: int  # N_B, number of blocks replaced
    direction: str  # "last" (back to front) or "first"
    method: str
    num_branches: int | None
    run: Run | None

    @property
    def is_finished(self) -> bool:
        return self.run is not None and "evaluate" in self.run.stages


@dataclass(frozen=True)
class Sweep:
    """One sweep folder."""

    name: str
    settings: dict[str, Any]
    cells: list[Cell]
    boundary: list[Row]
    environment: Any = None
    dense: Run | None = None


@dataclass(frozen=True)
class Contest:
    """One comparison folder: methods under the same budgets."""

    name: str
    settings: dict[str, Any]
    cells: list[tuple[Row, Run | None]]  # what comparison.json says of a cell, and its run where there is one
    dense: Run | None = None
    dense_bits: float | None = None


def _object(path: Path) -> dict[str, Any]:
    """Content of one JSON file; ValueError with the file's name if it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"report: {path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "delete the file and run its stage again"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"report: {path} is not UTF-8 text; delete the file and run its stage again") from None
    if not isinstance(content, dict):
        raise ValueError(f"report: {path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def _rows(path: Path, content: dict[str, Any], key: str, *needed: str) -> list[Row]:
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"report: {path} must hold {key!r}, a list of objects; delete it and run it again")
    for row in rows:
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"report: {path}: one of {key!r} lacks {', '.join(missing)}: {json.dumps(row)[:200]}")
    return [Row(row) for row in rows]


def _stage(path: Path) -> Stage:
    content = _object(path)
    others = (content.get(key) for key in ("environment", "seconds", "finished"))
    return Stage(_rows(path, content, "rows"), *others)


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def is_contest(folder: Path) -> bool:
    return (folder / "comparison.json").is_file()


def is_run(folder: Path) -> bool:
    return any((folder / f"{name}.json").is_file() for name in ("recipe", *STAGES))


def read_run(folder: Path, name: str | None = None) -> Run:
    """One run folder; its `dense/` subfolder is the reference where it is a run itself."""
    recipe = _object(folder / "recipe.json") if (folder / "recipe.json").is_file() else {}
    stages = {s: _stage(folder / f"{s}.json") for s in STAGES if (folder / f"{s}.json").is_file()}
    return Run(name or folder.resolve().name, folder, recipe, stages, _run(folder / "dense", "dense"))


def _run(folder: Path, name: str) -> Run | None:
    return read_run(folder, name) if is_run(folder) else None


def _of_variant(row: Row) -> Row:
    """The row with the variant that a sweep varied, where there is one, as its method: series are told apart by it."""
    return Row({**row, "method": row["variant"]}) if row.get("variant") else row


def read_sweep(folder: Path) -> Sweep:
    """One sweep folder with all its cells, finished or not."""
    path = folder / "sweep.json"
    content = _object(path)
    places = ("depth", "direction", "method", "num_branches")
    cells = [
        Cell(row["cell"], **{key: row[key] for key in places}, run=_run(folder / row["folder"], row["cell"]))
        for row in map(_of_variant, _rows(path, content, "cells", "cell", "folder", *places))
    ]
    dense = [_run(folder / "dense", "dense"), *(cell.run.dense for cell in cells if cell.run is not None)]
    return Sweep(
        name=folder.resolve().name,
        settings=content["settings"],
        cells=cells,
        boundary=[_of_variant(row) for row in _rows(path, content, "boundary")],
        environment=content.get("environment"),
        dense=next((run for run in dense if run is not None), None),
    )


def read_contest(folder: Path) -> Contest:
    """One comparison folder with all its cells, finished or not."""
    path = folder / "comparison.json"
    content = _object(path)
    rows = _rows(path, content, "cells", "cell", "folder")
    return Contest(
        name=folder.resolve().name,
        settings=content["settings"],
        cells=[(row, _run(folder / row["folder"], row["cell"])) for row in rows],
        dense=_run(folder / "dense", "dense"),
        dense_bits=(content.get("dense") or {}).get("bits"),
    )


def read_folder(folder: Path) -> Run | Sweep | Contest:
    """A run, a sweep or a comparison. Raises ValueError, naming what is missing, for another folder."""
    if not folder.exists():
        raise ValueError(f"report: no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"report: {folder} is a file; give the run or sweep folder, for example {folder.parent}")
    for is_kind, read in ((is_sweep, read_sweep), (is_contest, read_contest), (is_run, read_run)):
        if is_kind(folder):
            return read(folder)
    inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and (is_run(child) or is_sweep(child)))
    hint = f"; its subfolder {inside[0]} is one, did you mean {folder / inside[0]}?" if inside else ""
    raise ValueError(
        f"report: {folder} is no run, sweep or comparison: it has no sweep.json, comparison.json or recipe.json, "
        f"and no stage file ({', '.join(f'{stage}.json' for stage in STAGES)}){hint}"
    )


def runs_of(source: Run | Sweep | Contest) -> Iterator[Run]:
    """Every run of a source, the dense reference first."""
    if source.dense is not None:
        yield source.dense
    if isinstance(source, Run):
        yield source
        return
    runs = [run for _, run in source.cells] if isinstance(source, Contest) else [cell.run for cell in source.cells]
    seen = source.dense.folder if source.dense is not None else None
    yield from (run for run in runs if run is not None and run.folder != seen)
