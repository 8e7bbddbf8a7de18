"""Writes a comparison folder with invented numbers, by the schema of the stages. For tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VALUES = {  # label, keep -> bits, perplexity of each seed
    ("low", 0.5): (600, (9.0, 11.0)),
    ("low", 0.25): (350, (40.0, 44.0)),
    ("small", 0.5): (590, (5.0, 5.5)),
    ("small", 0.25): (340, (70.0, 71.0)),
    ("drop_blocks", 0.5): (580, (20.0, 20.0)),
}


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def evaluate(perplexity: float, kl: float | None = None) -> dict[str, Any]:
    rows = [{"kind": "perplexity", "text": "book <1>", "value": perplexity}]
    return {"rows": rows + ([] if kl is None else [{"kind": "kl", "text": "book <1>", "value": kl}])}


def write_contest(folder: Path) -> Path:
    """Three methods at two budgets with two seeds, and a cell that cannot be made."""
    cells: list[dict[str, Any]] = []
    for (label, keep), (bits, seeds) in VALUES.items():
        for seed, value in enumerate(seeds):
            name = f"{label}-{keep:g}-s{seed}"
            row = {"cell": name, "folder": name, "label": label, "method": label, "null": label == "drop_blocks"}
            row |= {"keep": keep, "seed": seed, "bits": bits, "achieved_keep": keep - 0.01, "missed_by": -0.01}
            cells.append(row)
            write(folder / name / "evaluate.json", evaluate(value, value / 10))
            speed = {"kind": "latency", "model": "compressed", "tokens": 1, "median_ms": 2.0, "speedup": 1.5 - keep}
            write(folder / name / "profile.json", {"rows": [speed]})
    impossible = {"cell": "low-0.01-s0", "folder": "low-0.01-s0", "label": "low", "keep": 0.01, "impossible": "no & no"}
    cells.append(impossible)
    write(folder / "dense" / "evaluate.json", evaluate(4.0))
    write(folder / "comparison.json", {"settings": {}, "dense": {"bits": 1000}, "cells": cells})
    return folder
