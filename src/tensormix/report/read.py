"""Run and sweep folders -> plain data. Reads JSON files only; nothing is loaded, nothing is computed.

A run folder holds `recipe.json` and one `<stage>.json` per finished stage; a sweep folder holds `sweep.json`,
whose cells are run folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STAGES = ("reparameterise", "compress", "direct", "recover", "evaluate", "diagnose", "profile")


@dataclass(frozen=True)
class Stage:
    """One `<stage>.json`."""

    rows: list[Row]
    settings: Any = None
    environment: Any = None
    seconds: float | None = None
    finished: Any = None  # when the stage ended, as it was written


@dataclass(frozen=True)
class Run:
    """One run folder: its recipe, its finished stages, its dense reference."""

    name: str
    folder: Path
    recipe: Row
    stages: dict[str, Stage]
    dense: Run | None = None

    def rows(self, stage: str, kind: str | None = None) -> list[Row]:
        """Rows of one stage (none if it has not finished), of one kind if asked."""
        rows = self.stages[stage].rows if stage in self.stages else []
        return [row for row in rows if kind is None or row.get("kind") == kind]


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep; `run` is None where its folder has no recipe and no stage yet."""

    name: str
    depth: int  # N_B, number of blocks replaced
    direction: str  # "last" (back to front) or "first"
    method: str
    num_branches: int | None
    run: Run | None


@dataclass(frozen=True)
class Sweep:
    """One sweep folder."""

    name: str
    folder: Path
    settings: Row
    cells: list[Cell]
    boundary: list[Row]
    environment: Any = None
    dense: Run | None = None
    finished: Any = None
    raw: Row = field(default_factory=dict)


def read_json(path: Path) -> Any:
    """Content of one JSON file; ValueError with the file's name if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"report: {path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "delete the file and run its stage again"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"report: {path} is not UTF-8 text; delete the file and run its stage again") from None


def _object(path: Path) -> Row:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"report: {path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def _stage(path: Path) -> Stage:
    content = _object(path)
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"report: {path} must hold 'rows', a list of objects; delete it and run the stage again")
    return Stage(
        rows, content.get("settings"), content.get("environment"), content.get("seconds"), content.get("finished")
    )


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def is_run(folder: Path) -> bool:
    return (folder / "recipe.json").is_file() or any((folder / f"{stage}.json").is_file() for stage in STAGES)


def read_run(folder: Path, name: str | None = None) -> Run:
    """One run folder; its `dense/` subfolder is the reference where it is a run itself."""
    recipe = _object(folder / "recipe.json") if (folder / "recipe.json").is_file() else {}
    stages = {s: _stage(folder / f"{s}.json") for s in STAGES if (folder / f"{s}.json").is_file()}
    dense = read_run(folder / "dense", "dense") if is_run(folder / "dense") else None
    return Run(name or folder.resolve().name, folder, recipe, stages, dense)


def _cell(sweep: Path, row: Row) -> Cell:
    missing = [key for key in ("cell", "folder", "depth", "direction", "method") if key not in row]
    if missing:
        raise ValueError(f"report: {sweep / 'sweep.json'}: a cell lacks {', '.join(missing)}: {json.dumps(row)[:200]}")
    folder = sweep / str(row["folder"])
    run = read_run(folder, str(row["cell"])) if is_run(folder) else None
    branches = row.get("num_branches")
    return Cell(
        str(row["cell"]),
        int(row["depth"]),
        str(row["direction"]),
        str(row.get("variant") or row["method"]),
        branches,
        run,
    )


def _dense_of(folder: Path, content: Row, cells: list[Cell]) -> Run | None:
    """The dense reference: the sweep's own, else a cell of depth 0, else that of any cell."""
    named = content.get("dense")
    for path in [folder / named if isinstance(named, str) else folder / "dense", folder / "dense"]:
        if is_run(path):
            return read_run(path, "dense")
    runs = [cell.run for cell in cells if cell.depth == 0 and cell.run is not None]
    runs += [cell.run.dense for cell in cells if cell.run is not None and cell.run.dense is not None]
    return runs[0] if runs else None


def read_sweep(folder: Path) -> Sweep:
    """One sweep folder with all its cells, finished or not."""
    path = folder / "sweep.json"
    content = _object(path)
    rows = content.get("cells")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"report: {path} must hold 'cells', a list of objects")
    cells = [_cell(folder, row) for row in rows]
    settings = content.get("settings")
    boundary = content.get("boundary") or []
    return Sweep(
        name=folder.resolve().name,
        folder=folder,
        settings=settings if isinstance(settings, dict) else {},
        cells=cells,
        boundary=[row for row in boundary if isinstance(row, dict)],
        environment=content.get("environment"),
        dense=_dense_of(folder, content, cells),
        finished=content.get("finished"),
        raw=content,
    )


@dataclass(frozen=True)
class Contest:
    """One comparison folder: methods under the same budgets."""

    name: str
    folder: Path
    settings: Row
    cells: list[tuple[Row, Run | None]]  # what comparison.json says of a cell, and its run where there is one
    dense: Run | None = None
    dense_bits: float | None = None
    finished: Any = None


def is_contest(folder: Path) -> bool:
    return (folder / "comparison.json").is_file()


def read_contest(folder: Path) -> Contest:
    """One comparison folder with all its cells, finished or not."""
    path = folder / "comparison.json"
    content = _object(path)
    rows = content.get("cells")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "folder" in row for row in rows):
        raise ValueError(f"report: {path} must hold 'cells', a list of objects with a folder")
    runs = [folder / str(row["folder"]) for row in rows]
    dense = content.get("dense") or {}
    return Contest(
        name=folder.resolve().name,
        folder=folder,
        settings=content.get("settings") or {},
        cells=[
            (row, read_run(run, str(row.get("cell"))) if is_run(run) else None)
            for row, run in zip(rows, runs, strict=True)
        ],
        dense=read_run(folder / "dense", "dense") if is_run(folder / "dense") else None,
        dense_bits=dense.get("bits"),
        finished=content.get("finished"),
    )


def read_folder(folder: Path) -> Run | Sweep | Contest:
    """A run, a sweep or a comparison; ValueError that names what is missing if it is none of them."""
    if not folder.exists():
        raise ValueError(f"report: no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"report: {folder} is a file; give the run or sweep folder, for example {folder.parent}")
    if is_sweep(folder):
        return read_sweep(folder)
    if is_contest(folder):
        return read_contest(folder)
    if is_run(folder):
        return read_run(folder)
    inside = sorted(child.name for child in folder.iterdir() if child.is_dir() and (is_run(child) or is_sweep(child)))
    hint = f"; its subfolder {inside[0]} is one, did you mean {folder / inside[0]}?" if inside else ""
    raise ValueError(
        f"report: {folder} is no run and no sweep: it has neither sweep.json nor recipe.json "
        f"nor a stage file ({', '.join(f'{stage}.json' for stage in STAGES)}){hint}"
    )


def runs_of(source: Run | Sweep | Contest) -> Iterator[Run]:
    """Every run of a source, the dense reference first."""
    if source.dense is not None:
        yield source.dense
    if isinstance(source, Run):
        yield source
        return
    if isinstance(source, Contest):
        yield from (run for _, run in source.cells if run is not None)
        return
    seen = source.dense.folder if source.dense is not None else None
    yield from (cell.run for cell in source.cells if cell.run is not None and cell.run.folder != seen)
