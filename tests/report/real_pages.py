"""Copies of folders that real stages wrote, changed on purpose, and what their pages hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[dict[str, Any]], Any]


def copied(folder: Path, where: Path, *, at: str | None = None) -> Path:
    """A folder without its weights."""
    shutil.copytree(folder, where / (at or folder.name), ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    return where / (at or folder.name)


def change(path: Path, how: Change) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    how(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_rows(folder: Path, stage: str, kind: str, **values: Any) -> None:
    """Give all rows of a kind these values."""
    change(folder / f"{stage}.json", lambda content: [row.update(values) for row in content["rows"]
                                                      if row.get("kind") == kind])  # fmt: skip


def rows_of(folder: Path, stage: str, kind: str | None = None) -> list[dict[str, Any]]:
    rows = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if kind is None or row["kind"] == kind]


def cells_of(sweep: Path) -> list[dict[str, Any]]:
    """Those of a sweep, without the dense model."""
    return [cell for cell in json.loads((sweep / "sweep.json").read_text())["cells"] if cell["depth"]]


def set_boundary(sweep: Path, **values: Any) -> None:
    """Change the boundary of MixT, back to front."""

    def how(content: dict[str, Any]) -> None:
        for row in content["boundary"]:
            if row["kind"] == "boundary" and (row["method"], row["direction"]) == ("mixt", "last"):
                row.update(values)

    change(sweep / "sweep.json", how)


def model_of(folder: Path) -> str:
    """The last part of its name, as in headlines."""
    recipe = json.loads(next(folder.rglob("recipe.json")).read_text())
    return Path(recipe["model"]).name
