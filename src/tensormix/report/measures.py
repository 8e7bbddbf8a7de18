"""Rows of stages -> one record per cell, and the plain facts of a whole sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tensormix.rows.labels import text_name

from .numbers import number, series_name
from .read import Row, Run, Sweep

CHANCE = 0.25  # four answers


Key = tuple[str, str, int | None]  # of a series: method, direction, branches


@dataclass(frozen=True, eq=False)
class Record:
    """What was measured on one checkpoint; None where it was not measured."""

    name: str
    depth: int | None = None
    direction: str = "last"
    method: str = "mixt"
    num_branches: int | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    num_questions: int | None = None
    subjects: dict[str, Row] = field(default_factory=dict)
    output_entropy: float | None = None
    prediction_entropy: float | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)  # region -> mean
    drift_profile: dict[int, float] = field(default_factory=dict)  # start layer -> mean
    resources: Row = field(default_factory=Row)
    latency: dict[int, Row] = field(default_factory=dict)  # tokens -> row
    dense_resources: Row = field(default_factory=Row)
    dense_latency: dict[int, Row] = field(default_factory=dict)
    losses: list[Row] = field(default_factory=list)
    benchmarks: dict[str, float] = field(default_factory=dict)  # benchmark -> accuracy
    macro_drop: float | None = None  # percentage points
    residual: Row = field(default_factory=Row)  # after the last compressed block
    direct: Record | None = None  # the same model before its recovery

    @property
    def series(self) -> Key:
        return (self.method, self.direction, self.num_branches)

    @property
    def label(self) -> str:
        return series_name(*self.series)

    def is_of(self, row: Row) -> bool:
        """Is the row about this record's series?"""
        return (row["method"], row["direction"], row["num_branches"]) == self.series

    def resource(self, key: str) -> float | None:
        return number(self.resources.get(key))

    @property
    def spread(self) -> float | None:
        """-log10(1 - PE); None at PE = 1, where it is infinite."""
        pe = self.prediction_entropy
        return None if pe is None or pe >= 1 else -math.log10(1 - pe)

    @property
    def bits_saved(self) -> float | None:
        """Percent of the stored bits of the dense model without its input embeddings, in the dtype that was run."""
        if not self.resources or not self.dense_resources:
            return None
        dtype, embedding = self.resources["dtype"], self.dense_resources["embedding_bytes"]
        own, dense = (row["bytes"].get(dtype) for row in (self.resources, self.dense_resources))
        return None if own is None or dense is None else 100 * (1 - (own - embedding) / (dense - embedding))

    def speedup(self, tokens: int) -> float | None:
        """Dense time / compressed time, measured in turn in one process; above 1 is faster."""
        return number(self.latency[tokens]["speedup"]) if tokens in self.latency else None


def _value(rows: Iterable[Row]) -> float | None:
    return next((number(row["value"]) for row in rows), None)


def values(rows: Iterable[Row], key: str) -> dict[Any, float]:
    return {row[key]: value for row in rows if (value := number(row["value"])) is not None}


def _perplexity(rows: Iterable[Row]) -> dict[str, float]:
    return {text_name(row): value for row in rows if (value := number(row["value"])) is not None}


def _exam(run: Run) -> dict[str, Any]:
    rows = run.rows("evaluate", "accuracy")
    overall = next((row for row in rows if row["subject"] == "all"), None)
    if overall is None:
        return {}
    found = {key: number(overall[key]) for key in ("low", "high")}
    subjects = {row["subject"]: row for row in rows if row["subject"] != "all" and row["task"] == overall["task"]}
    return {
        "accuracy": number(overall["value"]),
        **found,
        "num_questions": overall["num_questions"],
        "subjects": subjects,
    }


def _profile(run: Run, dense: bool) -> dict[str, Any]:
    """Rows about the compressed model; a dense reference run has only, or equal, dense rows."""
    resources = {row["model"]: row for row in run.rows("profile", "resources")}
    latency: dict[str, dict[int, Row]] = {}
    for row in run.rows("profile", "latency"):
        latency.setdefault(row["model"], {})[row["tokens"]] = row
    order = ("dense", "compressed") if dense else ("compressed",)
    return {
        "resources": next((resources[name] for name in order if name in resources), Row()),
        "latency": next((latency[name] for name in order if name in latency), {}),
        "dense_resources": resources.get("dense", Row()),
        "dense_latency": latency.get("dense", {}),
    }


def record(run: Run | None, name: str, dense: bool = False, **place: Any) -> Record:
    """The record of one run (an empty one where there is no run)."""
    if run is None:
        return Record(name, **place)
    whole = [row for row in run.rows("evaluate", "accuracy") if row["subject"] == "all" and row["task"] != "exam"]
    profile = _profile(run, dense)
    return Record(
        name=name,
        output_entropy=_value(run.rows("diagnose", "output_entropy")),
        prediction_entropy=_value(run.rows("diagnose", "prediction_entropy")),
        perplexity=_perplexity(run.rows("evaluate", "perplexity")),
        drift=values(run.rows("diagnose", "drift_mean"), "region"),
        drift_profile=values(run.rows("diagnose", "drift_profile"), "layer"),
        losses=run.rows("recover", "loss"),
        benchmarks=values(whole, "task"),
        macro_drop=_value(run.rows("diagnose", "macro_drop")),
        residual=next(iter(run.rows("diagnose", "residual_last")), Row()),
        direct=_direct(run, name, profile["dense_resources"]),
        **_exam(run),
        **profile,
        **place,
    )


def _direct(run: Run, name: str, dense: Row) -> Record | None:
    """The compressed model before its recovery, where that was evaluated too."""
    if "direct" not in run.stages:
        return None
    return Record(
        name=name,
        perplexity=_perplexity(run.rows("direct", "perplexity")),
        macro_drop=_value(run.rows("direct", "macro_drop")),
        resources=next(iter(run.rows("direct", "size")), Row()),
        dense_resources=dense,
    )


def with_costs_of(dense: Record, items: Iterable[Record]) -> Record:
    """The dense record; where it was not profiled by itself, with what was measured of it beside another model."""
    beside = next((item for item in items if item.dense_resources), None)
    if dense.resources or beside is None:
        return dense
    return replace(dense, resources=beside.dense_resources, latency=beside.dense_latency)


def _order(item: Record) -> tuple[Any, ...]:
    return (item.method != "mixt", item.direction != "last", item.method, item.num_branches or 0, item.depth or 0)


def sweep_records(sweep: Sweep) -> tuple[Record, list[Record]]:
    """The dense record and one record per cell that has been evaluated, MixT back to front first."""
    places = ("depth", "direction", "method", "num_branches")
    cells = [
        record(cell.run, cell.name, **{name: getattr(cell, name) for name in places})
        for cell in sweep.cells
        if cell.run is not None and "evaluate" in cell.run.stages and cell.depth > 0
    ]
    dense = record(sweep.dense, "dense", dense=True, depth=0, method="dense")
    return with_costs_of(dense, cells), sorted(cells, key=_order)


def by_series(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Records grouped by (method, direction, branches), in order of depth."""
    groups: dict[Key, list[Record]] = {}
    for item in records:
        groups.setdefault(item.series, []).append(item)
    return {key: sorted(group, key=lambda item: item.depth or 0) for key, group in groups.items()}
