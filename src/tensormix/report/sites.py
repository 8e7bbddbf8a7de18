"""Tables of single runs: sites, storage by method, measures beside the dense model, subjects of the exam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from .figure import Column, Shown, Table, data, table
from .measures import Record
from .numbers import METHODS, MINUS, MISSING, change, count, fixed, number, percent, seconds_text, short
from .read import Row, Run
from .tables import accuracy, interval, with_change

TARGETS = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "feed-forward": ("gate", "up", "gate_up", "down"),
}


def target_of(row: Row) -> str:
    return next((name for name, roles in TARGETS.items() if row["role"] in roles), "block")


class Storage(NamedTuple):
    """What one method stores at one kind of site of a run."""

    run: str
    method: str
    target: str
    sites: int
    dense_parameters: int
    parameters: int
    local_ratio: float | None
    saved: float | None  # of the whole model without its input embeddings


def storage_table(runs: Sequence[Run]) -> Table | None:
    """For each method and target: sites, stored numbers, local ratio, and the share of the model that it saves."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for run in runs:
        for row in run.rows("compress"):
            groups.setdefault((run.name, row["method"], target_of(row)), []).append(row)
    if not groups:
        return None
    wholes, items = {run.name: _whole(run) for run in runs}, []
    for (run, method, target), rows in groups.items():
        dense, own = (sum(row[key] for row in rows) for key in ("dense_parameters", "parameters"))
        whole, ratio = wholes[run], dense / own if own else None
        items.append(
            Storage(run, method, target, len(rows), dense, own, ratio, (dense - own) / whole if whole else None)
        )
    columns = [
        Column("Run", lambda item: item.run),
        Column("Method", lambda item: METHODS.get(item.method, item.method), numeric=False),
        Column("Target", lambda item: item.target, numeric=False),
        Column("Sites", lambda item: str(item.sites)),
        Column("Dense", lambda item: count(item.dense_parameters)),
        Column("Stored", lambda item: count(item.parameters)),
        Column("Local ratio", lambda item: short(item.local_ratio), "dense / stored"),
        Column("Saved", lambda item: percent(item.saved, 2), "without embeddings"),
    ]
    caption = "Numbers that each method stores, and what that saves"
    return table(
        "Storage of each method", columns, items, caption=caption, key="storage", file="storage.csv",
        data=data(items, Storage._fields),
    )  # fmt: skip


def _whole(run: Run) -> float | None:
    """Parameters of the dense model without its input embeddings; None where it was not profiled."""
    row = next((row for row in run.rows("profile", "resources") if row["model"] == "dense"), None)
    if row is None:
        return None
    return row["parameters"] * (1 - row["embedding_bytes"] / row["bytes"][row["dtype"]])


def sites_table(run: Run) -> Table | None:
    """Every replaced site of one run."""

    def beside(row: Row, key: str) -> Shown:
        own, dense = number(row[key]), number(row[f"dense_{key}"])
        return with_change(count(own), change(own, dense))

    columns = [
        Column("Site", lambda row: Markup("<code>{}</code>").format(row["site"])),
        Column("Method", lambda row: row["method"], numeric=False),
        Column("Operator", lambda row: row["operator"], numeric=False),
        Column("Parameters", lambda row: beside(row, "parameters")),
        Column("MACs per token", lambda row: beside(row, "macs_per_token")),
        Column("Relative error", lambda row: percent(number(row["relative_error"]))),
        Column("Time", lambda row: seconds_text(number(row["seconds"]))),
    ]
    found = run.rows("compress")
    return table("Sites", columns, found) if found else None


def measures_table(item: Record, dense: Record) -> Table:
    """One line per measure: dense, this run, change."""
    shift = None if item.accuracy is None or dense.accuracy is None else 100 * (item.accuracy - dense.accuracy)
    points = MISSING if shift is None else f"{shift:+.1f} points".replace("-", MINUS)
    values = [
        ("Output entropy (OE)", dense.output_entropy, item.output_entropy, fixed),
        ("Prediction entropy (PE)", dense.prediction_entropy, item.prediction_entropy, fixed),
        *(
            (f"Perplexity: {name}", dense.perplexity.get(name), item.perplexity.get(name), short)
            for name in dict.fromkeys([*dense.perplexity, *item.perplexity])
        ),
    ]
    lines = [("Exam accuracy", accuracy(dense), accuracy(item), points)]
    lines += [(name, show(whole), show(own), change(own, whole)) for name, whole, own, show in values]
    lines += [
        (f"Geometry drift, {name}", "0 by definition", fixed(item.drift[region], 4), MISSING)
        for region, name in (("all", "all layer pairs"), ("output", "pairs near the output"))
        if region in item.drift
    ]
    heads = ("Measure", "Dense", "This run", "Change")
    return table("Measures", [Column(head, lambda line, i=i: line[i]) for i, head in enumerate(heads)], lines)


def subjects_table(item: Record, dense: Record) -> Table | None:
    """Accuracy by subject, the dense model beside it."""

    def shown(row: Row | None) -> Shown | str:
        return interval(row["value"], row["low"], row["high"]) if row else MISSING

    columns = [
        Column("Subject", lambda name: name),
        Column("Questions", lambda name: str(item.subjects[name]["num_questions"])),
        Column("Accuracy", lambda name: shown(item.subjects[name])),
        Column("Dense", lambda name: shown(dense.subjects.get(name))),
    ]
    return table("Accuracy by subject", columns, item.subjects) if item.subjects else None
