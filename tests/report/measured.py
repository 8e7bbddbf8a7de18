"""Rows of the diagnostics and benchmarks, invented but by the schema of the stages. For tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_folders import stage, write

TASKS = ("arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande")


def benchmark_rows(gone: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"kind": "accuracy", "task": task, "subject": "all", "value": 0.6 - 0.3 * gone + 0.01 * i, "low": 0.1,
         "high": 0.9, "num_questions": 100, "shots": 0}
        for i, task in enumerate(TASKS)
    ]  # fmt: skip
    return [*rows, {"kind": "macro_accuracy", "value": 0.62 - 0.3 * gone, "tasks": list(TASKS)}]


def pair_rows(gone: float, depth: int, num_blocks: int = 12) -> list[dict[str, Any]]:
    """What is measured of a compressed model beside the dense one."""
    rows: list[dict[str, Any]] = [
        {"kind": "macro_drop", "value": 30 * gone, "tasks": list(TASKS)},
        {"kind": "residual_last", "block": num_blocks - 1, "layer": num_blocks, "angle": 3 + 40 * gone,
         "norm_ratio": 1 - 0.4 * gone, "num_tokens": 512},
    ]  # fmt: skip
    rows += [
        {"kind": "sensitivity", "change": "compress", "block": b, "value": 18 + 9 / (b + 1), "loss": 2.9, "whole": 18.0}
        for b in range(num_blocks)
    ]
    rows += [
        {"kind": "spectral_gap", "site": f"model.layers.{b}.down", "block": b, "role": "down", "mode": "weight",
         "rank": 8, "rank_of": "equal parameters", "order": 2, "value": 2.5 + b / 10, "bound": 12.0}
        for b in range(num_blocks - depth, num_blocks)
    ]  # fmt: skip
    return rows


def dense_rows(num_blocks: int = 12) -> list[dict[str, Any]]:
    """What is measured of the dense model alone."""
    rows: list[dict[str, Any]] = [
        {"kind": "sensitivity", "change": "drop", "block": b, "value": 18 + 60 / (b + 1), "loss": 3.0, "whole": 18.0}
        for b in range(num_blocks)
    ]
    for name, late in (("inlier", 0.2), ("top_magnitude", 0.5), ("activation_weighted", 0.8), ("super_weight", 0.4)):
        label = {"site": "model.layers.1.down", "block": 1, "set": name}
        rows += [
            {"kind": "restoration", **label, "rank": r, "value": max(0.0, min(1.0, (r / 64 - late) / 0.2)),
             "num_entries": 8, "tolerance": 0.1}
            for r in range(1, 65, 7)
        ]  # fmt: skip
        rows += [
            {"kind": "tracked_entry", **label, "row": 7 * i % 64, "column": (13 * i + len(name)) % 64,
             "value": 0.1 * i, "rank": 30}
            for i in range(1 if name == "super_weight" else 8)
        ]  # fmt: skip
    for block in range(num_blocks):
        for mode, exponent in (("expert", 0.04), ("output", 0.05), ("input", 0.2), ("weight", 0.3)):
            for role in ("down", "gate_up"):
                rows.append(
                    {"kind": "spectrum", "site": f"model.layers.{block}.{role}", "block": block, "role": role,
                     "mode": mode, "exponent": exponent + block / 200, "r_squared": 0.97, "first": 1, "last": 32,
                     "num_values": 64}
                )  # fmt: skip
    return rows


def direct_rows(before: float, parameters: int, bytes_: int) -> list[dict[str, Any]]:
    """A model before its recovery: worse, and without the patches that recovery adds."""
    rows: list[dict[str, Any]] = [
        {"kind": "perplexity", "text": name, "value": before * base, "num_tokens": 4096, "window": 512, "stride": 512,
         "bos": True, "dtype": "float32"}
        for name, base in (("wikitext-2", 1.0), ("held-out facts", 0.5))
    ]  # fmt: skip
    rows.append({"kind": "macro_drop", "value": before / 10, "tasks": list(TASKS)})
    return [*rows, {"kind": "size", "dtype": "float32", "parameters": parameters, "bytes": {"float32": bytes_}}]


def scaling_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"kind": "scaling_trend", "floor": 1.5, "scale": 90.0, "exponent": 0.25, "value": 0.01, "num_models": 3}
    ]
    points = (("small", "dense", 10e6, 0.0), ("middle", "dense", 25e6, 0.01), ("large", "dense", 45e6, -0.01),
              ("last-04-mixt4", "compressed", 33e6, -0.1))  # fmt: skip
    for model, family, parameters, off in points:
        expected = 1.5 + 90 * parameters**-0.25
        rows.append({"kind": "scaling", "model": model, "family": family, "parameters": parameters,
                     "loss": expected + off, "expected": expected, "residual": off})  # fmt: skip
    return rows


def add(folder: Path, stage: str, rows: list[dict[str, Any]]) -> None:
    path = folder / f"{stage}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"] += rows
    path.write_text(json.dumps(content), encoding="utf-8")


def measure_everything(folder: Path, cells: dict[str, tuple[float, int]]) -> Path:
    """Adds all of these rows to a sweep folder; `cells` gives (share gone, depth) of each cell."""
    add(folder / "dense", "evaluate", benchmark_rows(0.0))
    add(folder / "dense", "diagnose", dense_rows())
    for cell, (gone, depth) in cells.items():
        add(folder / cell, "evaluate", benchmark_rows(gone))
        add(folder / cell, "diagnose", pair_rows(gone, depth))
        rows = direct_rows(200.0 * (1 + gone), 40_000_000, 4 * (45_000_000 - 3_000_000 * depth))
        write(folder / cell / "direct.json", stage("direct", rows))
    path = folder / "sweep.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["boundary"] += scaling_rows()
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder
