"""Rows of stages -> one record per cell, and the plain facts of a whole sweep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .numbers import NARROW, number, series_name, short
from .read import Cell, Row, Run, Sweep

CHANCE = 0.25  # four answers


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
    resources: Row = field(default_factory=dict)
    latency: dict[int, Row] = field(default_factory=dict)  # tokens -> row
    dense_resources: Row = field(default_factory=dict)
    dense_latency: dict[int, Row] = field(default_factory=dict)
    losses: list[Row] = field(default_factory=list)
    benchmarks: dict[str, float] = field(default_factory=dict)  # benchmark -> accuracy
    macro_drop: float | None = None  # percentage points
    residual: Row = field(default_factory=dict)  # after the last compressed block
    direct: Record | None = None  # the same model before its recovery

    @property
    def series(self) -> tuple[str, str, int | None]:
        return (self.method, self.direction, self.num_branches)

    @property
    def label(self) -> str:
        return series_name(self.method, self.direction, self.num_branches)

    def resource(self, key: str) -> float | None:
        return number(self.resources.get(key))

    @property
    def bits_saved(self) -> float | None:
        """Percent of the stored bits of the dense model without its input embeddings, in the dtype that was run."""
        dtype = self.resources.get("dtype") or "float32"
        sizes = [number((row.get("bytes") or {}).get(dtype)) for row in (self.resources, self.dense_resources)]
        embedding = number(self.dense_resources.get("embedding_bytes")) or 0.0
        own, dense = sizes
        return None if own is None or dense is None else 100 * (1 - (own - embedding) / (dense - embedding))

    def speedup(self, tokens: int) -> float | None:
        """Dense time / compressed time; above 1 is faster. Both sides from the same cell where it has them."""
        row = self.latency.get(tokens, {})
        given = number(row.get("speedup"))
        if given is not None:
            return given
        dense, own = number(self.dense_latency.get(tokens, {}).get("median_ms")), number(row.get("median_ms"))
        return dense / own if dense and own else None


def _first(rows: Iterable[Row], key: str = "value") -> float | None:
    return next((number(row.get(key)) for row in rows), None)


def _pick(rows: list[Row], model: str) -> Row:
    return next((row for row in rows if row.get("model") == model), {})


def _exam(run: Run) -> Row:
    rows = run.rows("evaluate", "accuracy")
    overall = next((row for row in rows if row.get("subject", "all") == "all"), {})
    questions = number(overall.get("num_questions"))
    return {
        "accuracy": number(overall.get("value")),
        "low": number(overall.get("low")),
        "high": number(overall.get("high")),
        "num_questions": None if questions is None else int(questions),
        "subjects": {
            str(row["subject"]): row
            for row in rows
            if row.get("subject", "all") != "all" and row.get("task") == overall.get("task")
        },
    }


def _profile(run: Run, dense: bool) -> Row:
    """Rows about the compressed model; a dense reference run has only, or equal, dense rows."""
    own, other = ("dense", "compressed") if dense else ("compressed", "dense")
    resources, latency = run.rows("profile", "resources"), run.rows("profile", "latency")

    def times(model: str) -> dict[int, Row]:
        return {int(row["tokens"]): row for row in latency if row.get("model") == model and "tokens" in row}

    return {
        "resources": _pick(resources, own) or (_pick(resources, other) if dense else {}),
        "latency": times(own) or (times(other) if dense else {}),
        "dense_resources": _pick(resources, "dense"),
        "dense_latency": times("dense"),
    }


def record(run: Run | None, name: str, dense: bool = False, **place: Any) -> Record:
    """The record of one run (an empty one where there is no run)."""
    if run is None:
        return Record(name, **place)
    drift = {str(row.get("region")): number(row.get("value")) for row in run.rows("diagnose", "drift_mean")}
    profile = {int(row["layer"]): number(row.get("value")) for row in run.rows("diagnose", "drift_profile")}
    return Record(
        name=name,
        output_entropy=_first(run.rows("diagnose", "output_entropy")),
        prediction_entropy=_first(run.rows("diagnose", "prediction_entropy")),
        perplexity=_perplexity(run.rows("evaluate", "perplexity")),
        drift={key: value for key, value in drift.items() if value is not None},
        drift_profile={key: value for key, value in profile.items() if value is not None},
        losses=run.rows("recover", "loss"),
        benchmarks={
            str(row["task"]): row["value"]
            for row in run.rows("evaluate", "accuracy")
            if row.get("subject", "all") == "all" and row.get("task", "exam") != "exam"
        },
        macro_drop=_first(run.rows("diagnose", "macro_drop")),
        residual=next(iter(run.rows("diagnose", "residual_last")), {}),
        direct=_direct(run, name, _pick(run.rows("profile", "resources"), "dense")),
        **_exam(run),
        **_profile(run, dense),
        **place,
    )


def _perplexity(rows: Iterable[Row]) -> dict[str, float]:
    return {str(row.get("text", "text")): y for row in rows if (y := number(row.get("value"))) is not None}


def _direct(run: Run, name: str, dense: Row) -> Record | None:
    """The compressed model before its recovery, where that was evaluated too."""
    if "direct" not in run.stages:
        return None
    return Record(
        name=name,
        perplexity=_perplexity(run.rows("direct", "perplexity")),
        macro_drop=_first(run.rows("direct", "macro_drop")),
        resources=next(iter(run.rows("direct", "size")), {}),
        dense_resources=dense,
    )


def _place(cell: Cell) -> Row:
    return {
        "depth": cell.depth,
        "direction": cell.direction,
        "method": cell.method,
        "num_branches": cell.num_branches,
    }


def _order(item: Record) -> tuple[Any, ...]:
    return (item.method != "mixt", item.direction != "last", item.method, item.num_branches or 0, item.depth or 0)


def sweep_records(sweep: Sweep) -> tuple[Record, list[Record]]:
    """The dense record and one record per cell that has been evaluated, MixT back to front first."""
    dense = record(sweep.dense, "dense", dense=True, depth=0, method="dense")
    cells = [
        record(cell.run, cell.name, **_place(cell))
        for cell in sweep.cells
        if cell.run is not None and "evaluate" in cell.run.stages and cell.depth > 0
    ]
    if not dense.resources:
        rows = next((item for item in cells if item.dense_resources), None)
        if rows is not None:
            changed = {"resources": rows.dense_resources, "latency": rows.dense_latency}
            dense = Record(**{**dense.__dict__, **changed})
    return dense, sorted(cells, key=_order)


def by_series(records: Iterable[Record]) -> dict[tuple[str, str, int | None], list[Record]]:
    """Records grouped by (method, direction, branches), in order of depth."""
    groups: dict[tuple[str, str, int | None], list[Record]] = {}
    for item in records:
        groups.setdefault(item.series, []).append(item)
    return {key: sorted(group, key=lambda item: item.depth or 0) for key, group in groups.items()}


@dataclass(frozen=True)
class Boundary:
    """First N_B at which accuracy has left its plateau, with its interval; `value` None: it never left.

    `high` None while `value` is known: the interval is open, the boundary may lie beyond the scanned depths.
    """

    method: str
    direction: str
    num_branches: int | None
    value: float | None
    low: float | None
    high: float | None
    last_good: float | None
    row: Row

    @property
    def label(self) -> str:
        return series_name(self.method, self.direction, self.num_branches)

    @property
    def series(self) -> tuple[str, str, int | None]:
        return (self.method, self.direction, self.num_branches)

    @property
    def interval(self) -> str:
        """ "12 to 15", "12 or later", or nothing."""
        if self.value is None or self.low is None:
            return ""
        if self.high is None:
            return f"{short(self.low)} or later"
        return short(self.low) if self.low == self.high else f"{short(self.low)} to {short(self.high)}"

    @property
    def confidence(self) -> str:
        return f"{100 * (number(self.row.get('confidence')) or 0.95):.4g}{NARROW}%"


def boundaries(sweep: Sweep) -> list[Boundary]:
    """The boundaries of accuracy that the sweep has written, the main one (MixT, back to front) first."""
    found = [
        Boundary(
            method=str(row.get("variant") or row.get("method", "mixt")),
            direction=str(row.get("direction", "last")),
            num_branches=row.get("num_branches"),
            value=number(row.get("value")),
            low=number(row.get("low")),
            high=number(row.get("high")),
            last_good=number(row.get("last_good")),
            row=row,
        )
        for row in sweep.boundary
        if row.get("kind") == "boundary"
    ]
    return sorted(found, key=lambda b: (b.method != "mixt", b.direction != "last"))


def num_blocks(sweep: Sweep) -> int | None:
    """Number of blocks of the model: as written, else from the sites (the last block is always replaced first)."""
    for source in (sweep.raw, sweep.settings, *sweep.boundary):
        given = number(source.get("num_blocks"))
        if given is not None:
            return int(given)
    blocks = [
        row["block"]
        for cell in sweep.cells
        if cell.run is not None and cell.direction == "last"
        for row in cell.run.rows("compress")
        if isinstance(row.get("block"), int)
    ]
    layers = [
        row["layer"]
        for cell in sweep.cells
        if cell.run is not None
        for row in cell.run.rows("diagnose", "drift_profile")
        if isinstance(row.get("layer"), int)
    ]
    known = layers or blocks  # layer 0 is what enters the first block, and the last layer has none after it
    return max(known) + 1 if known else None


def model_name(recipe: Any) -> str | None:
    """The value of the first key `model` that holds text, outermost first."""
    if not isinstance(recipe, dict):
        return None
    if isinstance(recipe.get("model"), str):
        return recipe["model"]
    return next((name for name in map(model_name, recipe.values()) if name), None)


def sweep_model(sweep: Sweep) -> str:
    recipes = [cell.run.recipe for cell in sweep.cells if cell.run is not None]
    return next((name for name in map(model_name, [sweep.settings, *recipes]) if name), sweep.name)


def last_on_plateau(records: list[Record], boundary: Boundary) -> Record | None:
    """The deepest measured checkpoint of the boundary's series that is still before the boundary."""
    group = [item for item in records if item.series == boundary.series and item.depth is not None]
    if boundary.last_good is not None:
        return next((item for item in group if item.depth == boundary.last_good), None)
    inside = [item for item in group if boundary.value is None or (item.depth or 0) < boundary.value]
    return max(inside, key=lambda item: item.depth or 0, default=None)
