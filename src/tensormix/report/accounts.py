"""Tables of the accounts of several runs: what each method stores, and everything that was measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figure import csv_text, download
from .measures import Record
from .numbers import METHODS, MISSING, count, fixed, nb, number, percent, short, text
from .read import Row, Run
from .tables import place, table

TARGETS = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "feed-forward": ("gate", "up", "gate_up", "down"),
}


def target_of(row: Row) -> str:
    return next((name for name, roles in TARGETS.items() if row.get("role") in roles), "block")


def storage_table(runs: Sequence[Run], keyed: str = "storage") -> str:
    """For each method and target: sites, stored numbers, local ratio, and the share of the model that it saves."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for run in runs:
        for row in run.rows("compress"):
            groups.setdefault((run.name, str(row.get("method")), target_of(row)), []).append(row)
    if not groups:
        return ""
    totals = {run.name: _whole(run) for run in runs}
    names = ["run", "method", "target", "sites", "dense_parameters", "parameters", "local_ratio", "saved"]
    heads = [("Run", ""), ("Method", ""), ("Target", ""), ("Sites", "n"), ("Dense", "n"), ("Stored", "n")]
    heads += [
        ("Local ratio<br><small>dense / stored</small>", "n"),
        ("Saved<br><small>without embeddings</small>", "n"),
    ]
    lines, data = [], []
    for (run, method, target), rows in groups.items():
        dense, own = (sum(number(row.get(key)) or 0.0 for row in rows) for key in ("dense_parameters", "parameters"))
        ratio = dense / own if own else None
        whole = totals[run]
        saved = (dense - own) / whole if whole else None
        cells = [text(run), text(METHODS.get(method, method)), target, str(len(rows)), count(dense), count(own)]
        lines.append(("", [*cells, short(ratio), percent(saved, 2)]))
        data.append([run, method, target, len(rows), dense, own, ratio, saved])
    link = download(f"{keyed}.csv", csv_text(names, data), "CSV")
    drawn = table("Storage of each method", heads, lines, "Numbers that each method stores, and what that saves")
    return f'<div id="{keyed}">{drawn}<p class="small">Download as {link}</p></div>'


def _whole(run: Run) -> float | None:
    """Parameters of the dense model without its input embeddings; None where it was not profiled."""
    row = next((row for row in run.rows("profile", "resources") if row.get("model") == "dense"), {})
    parameters, size = number(row.get("parameters")), number((row.get("bytes") or {}).get(row.get("dtype")))
    if parameters is None:
        return None
    share = (number(row.get("embedding_bytes")) or 0.0) / size if size else 0.0
    return parameters * (1 - share)


def details_table(dense: Record, records: Sequence[Record]) -> str:
    """Bits saved, perplexities, benchmarks with their mean, angle and length of every run, the dense model first."""
    items = [item for item in [dense, *records] if item.benchmarks or item.residual or item.macro_drop is not None]
    items = [dense, *(item for item in items if item is not dense)] if items else []
    if not items:
        return ""
    texts = list(dict.fromkeys(name for item in items for name in item.perplexity))
    tasks = list(dict.fromkeys(name for item in items for name in item.benchmarks))
    heads = [("Run", ""), (nb("N_B"), "n"), ("Bits saved<br><small>%</small>", "n")]
    heads += [(f"Perplexity<br><small>{text(name)}</small>", "n") for name in texts]
    heads += [("Macro drop<br><small>points</small>", "n"), *((text(name), "n") for name in tasks)]
    heads += [("Angle<br><small>degrees</small>", "n"), ("Length<br><small>dense = 1</small>", "n")]
    names = ["run", "N_B", "bits_saved_percent", *texts, "macro_drop", *tasks, "angle_degrees", "norm_ratio"]
    lines, data = [], []
    for item in items:
        values: list[Any] = [item.bits_saved, *(item.perplexity.get(name) for name in texts), item.macro_drop]
        values += [*(item.benchmarks.get(name) for name in tasks), item.residual.get("angle")]
        values.append(item.residual.get("norm_ratio"))
        shown = [fixed(item.bits_saved, 1), *(short(item.perplexity.get(name)) for name in texts)]
        shown += [fixed(item.macro_drop, 1), *(percent(item.benchmarks.get(name)) for name in tasks)]
        shown += [fixed(values[-2], 1), fixed(values[-1])]
        lines.append(("", [text(item.name), place(item) if item is not dense else MISSING, *shown]))
        data.append([item.name, item.depth, *values])
    link = download("details.csv", csv_text(names, data), "CSV")
    drawn = table("Details", heads, lines, "Everything that was measured beside what is saved")
    return f'<div id="details">{drawn}<p class="small">Download as {link}</p></div>'
