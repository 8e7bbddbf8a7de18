"""Writes run and sweep folders with invented but plausible numbers, by the schema of the stages. For tests only."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

NUM_BLOCKS = 12
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
DENSE = {"parameters": 45_000_000, "macs_per_token": 44_000_000}
PER_BLOCK = {"parameters": 3_000_000, "macs_per_token": 3_000_000}
KEPT = {"mixt": (0.0625, 0.5), "zero": (0.0, 0.0), "drop_blocks": (0.0, 0.0)}
ENVIRONMENT = {
    "versions": {"python": "3.12.3", "torch": "2.13.0"},
    "commit": "abc1234",
    "hardware": {"processor": "Example"},
}
SUBJECTS = ("capitals", "arithmetic")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def stage(name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    fixed = {"stage": name, "key": "0" * 16, "settings": {}, "environment": ENVIRONMENT, "seconds": 12.5}
    return {**fixed, "finished": "2026-01-02T03:04:05+00:00", "rows": rows, **more}


def fall(method: str, direction: str, depth: int) -> float:
    """0 (as good as dense) .. 1 (guessing)."""
    middle = {"mixt": 7.5, "zero": 5.0, "drop_blocks": 4.0}[method] if direction == "last" else 1.2
    return 0.0 if depth == 0 else 1 / (1 + math.exp(-(depth - middle) / 0.45)) * 0.97 + 0.004 * depth


def evaluate_rows(rng: random.Random, gone: float, num_questions: int = 600) -> list[dict[str, Any]]:
    def accuracy(subject: str, num: int) -> dict[str, Any]:
        chance = 0.72 - gone * 0.46
        value = sum(rng.random() < chance for _ in range(num)) / num
        half = 1.96 * math.sqrt(value * (1 - value) / num)
        row = {"kind": "accuracy", "task": "exam", "subject": subject, "value": value, "low": value - half}
        return {**row, "high": value + half, "num_questions": num}

    rows = [accuracy("all", num_questions), *(accuracy(name, num_questions // 2) for name in SUBJECTS)]
    for text, base in (("wikitext-2", 18.0), ("held-out facts", 4.2)):
        value = base * math.exp(gone * 3.2 + rng.random() * 0.03)
        row = {"kind": "perplexity", "text": text, "value": value, "num_tokens": 4096, "window": 512, "stride": 512}
        rows.append({**row, "bos": True, "dtype": "float32"})
    answer = {"kind": "answer", "task": "exam", "subject": "capitals", "id": "c1", "gold": 1, "predicted": 1}
    return [*rows, {**answer, "logits": [0.1, 2.0, 0.3, 0.2]}]


def diagnose_rows(rng: random.Random, gone: float, depth: int, direction: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"kind": "output_entropy", "value": 0.42 + 0.45 * gone + rng.random() * 0.01},
        {"kind": "prediction_entropy", "value": 0.995 - 0.3 * gone * rng.random()},
    ]
    if depth == 0:
        return rows
    for layer in range(NUM_BLOCKS):
        touched = layer >= NUM_BLOCKS - depth - 2 if direction == "last" else layer <= depth
        value = (0.006 * depth + 0.016 * max(0, depth - 7)) * (1.6 if touched else 0.35) + rng.random() * 0.004
        rows.append({"kind": "drift_profile", "layer": layer, "value": value})
    mean = sum(row["value"] for row in rows[2:]) / NUM_BLOCKS
    rows.append({"kind": "drift_mean", "region": "all", "value": mean})
    return [*rows, {"kind": "drift_mean", "region": "output", "value": mean * 1.9}]


def profile_rows(rng: random.Random, method: str, depth: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    kept = KEPT[method]
    for model in ("dense", "compressed"):
        gone = depth if model == "compressed" else 0
        sizes = {key: round(DENSE[key] - gone * PER_BLOCK[key] * (1 - kept[i])) for i, key in enumerate(DENSE)}
        bytes_ = {"float32": 4 * sizes["parameters"], "bfloat16": 2 * sizes["parameters"]}
        row = {"kind": "resources", "model": model, **sizes, "bytes_on_disk": bytes_["float32"] + 8192, "bytes": bytes_}
        rows.append({**row, "peak_memory_bytes": bytes_["float32"] + 30_000_000})
    for tokens, base, faster in ((1, 9.0, -0.02), (128, 80.0, 0.03)):
        for model in ("dense", "compressed"):
            ms = base * (1 if model == "dense" else 1 / (1 + faster * depth)) * (1 + rng.random() * 0.01)
            row = {"kind": "latency", "model": model, "tokens": tokens, "median_ms": ms, "low_ms": ms * 0.97}
            rows.append({**row, "high_ms": ms * 1.04, "speedup": base / ms})
    return rows


def compress_rows(method: str, direction: str, depth: int) -> list[dict[str, Any]]:
    blocks = range(NUM_BLOCKS - depth, NUM_BLOCKS) if direction == "last" else range(depth)
    if method == "drop_blocks":
        base = {"role": None, "method": method, "operator": "Bypass", "dense_parameters": 3_000_000, "parameters": 0}
        return [
            {"site": f"model.layers.{b}", "block": b, **base, "relative_error": None, "seconds": 0.0} for b in blocks
        ]
    rows = []
    for block in blocks:
        for index, role in enumerate(ROLES):
            error = 1.0 if method == "zero" else 0.97 - 0.01 * index - 0.002 * block
            row = {"site": f"model.layers.{block}.{role}_proj", "block": block, "role": role, "method": method}
            row |= {
                "operator": "MixT" if method == "mixt" else "Zero",
                "dense_parameters": 428_571,
                "parameters": 26_785,
            }
            rows.append(
                {
                    **row,
                    "dense_macs_per_token": 428_571,
                    "macs_per_token": 214_285,
                    "relative_error": error,
                    "seconds": 0.01,
                }
            )
    return rows


def loss_rows(rng: random.Random, gone: float, num: int = 60) -> list[dict[str, Any]]:
    rows = []
    for index in range(num):
        loss = 1.4 + gone * 1.5 + 2.5 * math.exp(-index / 9) + rng.random() * 0.05
        rows.append(
            {
                "kind": "loss",
                "step": 10 * (index + 1),
                "loss": loss,
                "learning_rate": 1e-3,
                "tokens": 40960,
                "seconds": 1.0,
            }
        )
    return rows


def write_run(folder: Path, method: str = "mixt", direction: str = "last", depth: int = 5, *, seed: int = 0,
              model: str = "example-org/example-45m", only: tuple[str, ...] | None = None) -> Path:  # fmt: skip
    """A finished run; `only` names the stages that are there."""
    rng = random.Random(f"{method}{direction}{depth}{seed}")
    gone = fall(method, direction, depth)
    stages = {
        "compress": compress_rows(method, direction, depth),
        "recover": loss_rows(rng, gone) if depth else [],
        "evaluate": evaluate_rows(rng, gone),
        "diagnose": diagnose_rows(rng, gone, depth, direction),
        "profile": profile_rows(rng, method, depth),
    }
    plan = [{"blocks": f"{direction} {depth}", "method": {"name": method}}] if depth else []
    write(
        folder / "recipe.json",
        {"model": model, "seed": seed, "dtype": "float32", "plan": plan, "evaluate": {"exam": {"seed": 1}}},
    )
    for name, rows in stages.items():
        if only is None or name in only:
            write(folder / f"{name}.json", stage(name, rows))
    return folder


def boundary_row(
    method: str, direction: str, num_branches: int | None, value: int | None, low: int | None, high: int | None
) -> dict[str, Any]:
    row = {"kind": "boundary", "method": method, "direction": direction, "num_branches": num_branches, "value": value}
    row |= {
        "last_good": value - 1 if value else NUM_BLOCKS,
        "low": low,
        "high": high,
        "confidence": 0.95,
        "plateau": 0.713,
    }
    return {
        **row,
        "plateau_spread": 0.018,
        "level": 0.31,
        "share_without": 0.0,
        "sentence": "accuracy does not leave its plateau",
    }


def write_sweep(folder: Path, *, model: str = "example-org/example-45m", unfinished: int = 0,
                depths: tuple[int, ...] = tuple(range(1, 12)), nulls: bool = True,
                first: bool = True) -> Path:  # fmt: skip
    """A sweep of MixT in both directions with null baselines; the deepest `unfinished` MixT cells are not done."""
    plans = [("mixt", "last", depth) for depth in depths]
    plans += [("mixt", "first", depth) for depth in depths[::2]] if first else []
    plans += [(method, "last", depth) for method in ("zero", "drop_blocks") for depth in depths[::2]] if nulls else []
    cells: list[dict[str, Any]] = [
        {"cell": "dense", "folder": "dense", "depth": 0, "direction": "last", "method": "dense", "num_branches": None}
    ]
    for method, direction, depth in plans:
        name = f"{method}-{direction}-{depth}"
        branches = 4 if method == "mixt" else None
        cells.append({"cell": name, "folder": name, "depth": depth, "direction": direction, "method": method})
        cells[-1]["num_branches"] = branches
        late = method == "mixt" and direction == "last" and depth in (depths[-unfinished:] if unfinished else ())
        if not (late and depth == depths[-1]):
            write_run(
                folder / name, method, direction, depth, model=model, only=("compress", "recover") if late else None
            )
    write_run(folder / "dense", depth=0, model=model)
    found = [("mixt", "last", 4, 7, 7, 8)]
    found += [("mixt", "first", 4, 1, 1, 2)] if first else []
    found += [("zero", "last", None, 5, 4, 5), ("drop_blocks", "last", None, 4, 4, 5)] if nulls else []
    boundary = [boundary_row(*row) for row in found]
    boundary.append({"kind": "drift_crossing", "value": 7.2, "method": "mixt", "direction": "last", "num_branches": 4})
    boundary[-1] |= {"height": 0.055, "slope_before": 0.008, "slope_after": 0.04}
    settings = {
        "recipe": {"model": model, "seed": 0, "recover": {"steps": 600}},
        "depths": list(depths),
        "num_branches": [4],
    }
    write(
        folder / "sweep.json", {"settings": settings, "cells": cells, "environment": ENVIRONMENT, "boundary": boundary}
    )
    return folder
