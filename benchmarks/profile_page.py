"""Parts of docs/performance.md: where the time of a call goes, what it takes in memory, what is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Table = Callable[[list[str], list[list[str]]], str]
NOTHING = "Not measured yet.\n"
STEPS = {  # PyTorch's operations by what the kernel does with them; the rest is Python and dispatch
    "matrix products": ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"),
    "moving numbers between layouts": ("copy_", "clone", "contiguous", "constant_pad_nd"),
    "adding up": ("add_", "add", "mul", "mul_", "sum", "fill_", "zero_"),
}


def shape(row: Row) -> str:
    return f"{row['in_features']} -> {row['out_features']}"


def steps(row: Row) -> dict[str, float]:
    """The share of each step of the kernel in the time of a call, under PyTorch's profiler."""
    spent = {name.removeprefix("aten::"): share for name, share in row.get("shares", {}).items()}
    found = {step: sum(spent.get(name, 0.0) for name in names) for step, names in STEPS.items()}
    return found | {"Python and dispatch": max(0.0, 1 - sum(found.values()))}


def profile(rows: list[Row]) -> str:
    """One line for each row: its time, its steps and, where multiplying is the cost, how fast its products are."""
    lines = []
    for row in rows:
        found = steps(row)
        parts = ", ".join(f"{step} {100 * share:.0f} %" for step, share in found.items() if share >= 0.01)
        weights = f", {row['weights']} weights" if row["tokens"] <= 8 else ""
        where = f"{shape(row)}, {row['tokens']} tokens, {row['pass']}{weights}"
        rate = ""
        if row["tokens"] >= 128:
            products = 100 * row["of_roofline"] / found["matrix products"]
            rate = f"; the products alone run at {products:.0f} % of the best rate"
        line = f"* {where}: {row['median_ms']:.2f} ms, {100 * row['of_roofline']:.0f} % of the roofline. {parts}{rate}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def memory(rows: list[Row], table: Table) -> str:
    """Dense beside MixT: the greatest rise of resident memory during one call, and the weights."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "memory":
            cases.setdefault((shape(row), row["pass"], row["tokens"]), {})[row["layer"]] = row
    body, more, saved = [], [0], []
    for (layer, kind, tokens), case in cases.items():
        dense, mixt = case["dense"], case["mixt"]
        sizes = [[row["peak_bytes"], row["weight_bytes"]] for row in (dense, mixt)]
        sizes = [f"{size / 2**20:.1f}" for pair in zip(*sizes, strict=True) for size in pair]
        more.append(mixt["peak_bytes"] - dense["peak_bytes"])
        saved.append(dense["weight_bytes"] - mixt["weight_bytes"])
        verdict = "lower" if mixt["peak_bytes"] < dense["peak_bytes"] else "higher"
        body.append([layer, kind, str(tokens), *sizes[:2], verdict, *sizes[2:]])
    head = ["layer", "pass", "tokens", "dense MiB", "mixt MiB", "mixt is", "dense weights MiB", "mixt weights MiB"]
    if not body:
        return NOTHING
    said = f"The aim was no more than dense: MixT takes at most {max(more) / 2**20:.1f} MiB more"
    return f"{said}; its weights take at least {min(saved) / 2**20:.1f} MiB less.\n\n" + table(head, body)


def choices(rows: list[Row], table: Table) -> str:
    body = [
        [shape(row), str(row["tokens"]), f"{row['structured_ms']:.3f}", f"{row['dense_ms']:.3f}", row["chosen"]]
        for row in rows
        if row["kind"] == "choice"
    ]
    return table(["layer", "tokens", "mixt ms", "dense ms", "chosen"], body) if body else NOTHING
