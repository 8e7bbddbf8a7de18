"""Tables of checkpoints: cells of a sweep, what they cost, everything that was measured beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tensormix.rows import STAGES

from .boundary import Boundary, marks_of
from .figure import Column, Columns, Shown, Table, data, table
from .measures import Record
from .numbers import (
    DIRECTIONS,
    METHODS,
    MISSING,
    bytes_text,
    change,
    count,
    fixed,
    milliseconds,
    nb,
    number,
    percent,
    plural,
    short,
)  # fmt: skip
from .read import Cell

COSTS = (("Parameters", "", "parameters", count), ("MACs", "per token", "macs_per_token", count),
         ("On disk", "", "bytes_on_disk", bytes_text))  # fmt: skip
PEAK = ("Peak memory", "", "peak_memory_bytes", bytes_text)


def with_change(value: str, delta: str) -> Shown:
    return Shown(value, "" if delta == MISSING else delta)


def interval(value: float | None, low: float | None, high: float | None) -> Shown:
    return Shown(percent(value), "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}")


def accuracy(item: Record) -> Shown:
    return interval(item.accuracy, item.low, item.high)


def place(item: Record) -> str:
    return "dense" if item.method == "dense" else str(item.depth)


def series_name(item: Record) -> str:
    return "" if item.method == "dense" else item.label


def texts_of(items: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(name for item in items for name in item.perplexity))


def perplexities(texts: Iterable[str]) -> list[Column]:
    return [Column("Perplexity", lambda item, name=name: short(item.perplexity.get(name)), name) for name in texts]


def measured(items: Sequence[Record]) -> list[Column]:
    """What is measured of every checkpoint."""
    return [
        Column("Accuracy", accuracy, "95\u00a0% interval"),
        Column("OE", lambda item: fixed(item.output_entropy)),
        Column("PE", lambda item: fixed(item.prediction_entropy)),
        *perplexities(texts_of(items)),
        Column("Drift", lambda item: fixed(item.drift.get("all"), 4), "all pairs"),
    ]


def measured_data(items: Sequence[Record], more: Sequence[str] = ()) -> Columns:
    """The same as columns of a file, `more` between accuracy and entropies."""
    columns: dict[str, str | Callable[[Record], object]] = {name: name for name in ("accuracy", "low", "high", *more)}
    columns |= {"OE": "output_entropy", "PE": "prediction_entropy"}
    columns |= {f"perplexity {name}": lambda item, n=name: item.perplexity.get(n) for name in texts_of(items)}
    return columns | {"drift_all": lambda item: item.drift.get("all")}


def cells_table(dense: Record, records: Sequence[Record], boundaries: Sequence[Boundary]) -> Table:
    """Every finished cell with what was measured on it; groups are separated, null baselines stand beside MixT."""
    items = [dense, *records]
    marks = {item: marks_of(item, boundaries, records) for item in items}
    columns = [
        Column("N_B", place),
        *measured(items),
        Column("Drift", lambda item: fixed(item.drift.get("output"), 4), "output"),
        Column("Mark", lambda item: ", ".join(marks[item]), numeric=False),
    ]
    places = {"cell": "name", "method": "method", "direction": "direction", "num_branches": "num_branches"}
    ends = {"drift_output": lambda item: item.drift.get("output"), "mark": lambda item: "; ".join(marks[item])}
    known = data(items, {**places, "N_B": "depth", **measured_data(items, ["num_questions"]), **ends})
    marked: Callable[[Record], bool] = lambda item: bool(marks[item])  # noqa: E731
    return table("All cells", columns, items, marked, series_name, file="cells.csv", data=known)


def resources_table(dense: Record, records: Sequence[Record], boundaries: Sequence[Boundary] = ()) -> Table | None:
    """Parameters, arithmetic, bytes, memory and time of every profiled cell, the dense model first."""
    items = [item for item in [dense, *records] if item.resources or item.latency]
    if not items:
        return None
    types = list(dict.fromkeys(name for item in items for name in item.resources.get("bytes", {})))

    def cost(name: str, small: str, value: Callable[[Record], float | None], show: Callable[..., str]) -> Column:
        def cell(item: Record) -> Shown | str:
            own = value(item)
            return show(own) if item is dense else with_change(show(own), change(own, value(dense)))

        return Column(name, cell, small)

    def of(key: str) -> Callable[[Record], float | None]:
        return lambda item: item.resource(key)

    def weights(dtype: str) -> Callable[[Record], float | None]:
        return lambda item: number(item.resources.get("bytes", {}).get(dtype))

    columns = [
        Column("N_B", place),
        *(cost(name, small, of(key), show) for name, small, key, show in COSTS),
        *(cost("Weights", dtype, weights(dtype), bytes_text) for dtype in types),
        cost(*PEAK[:2], of(PEAK[2]), PEAK[3]),
        *(
            Column("Latency", lambda item, num=num: latency(item, num), plural(num, "token"))
            for num in sorted({tokens for item in items for tokens in item.latency})
        ),
    ]
    marked: Callable[[Record], bool] = lambda item: bool(marks_of(item, boundaries, records))  # noqa: E731
    return table("Resources", columns, items, marked, series_name)


def latency(item: Record, tokens: int) -> Shown | str:
    ratio = item.speedup(tokens)
    value = milliseconds(number(item.latency[tokens]["median_ms"])) if tokens in item.latency else MISSING
    return value if item.method == "dense" or ratio is None else Shown(value, compared(ratio), ratio < 0.985)


def compared(ratio: float | None) -> str:
    """A dense/compressed time ratio; what is slower is said so."""
    if ratio is None:
        return MISSING
    return f"{ratio:.2f}×" + (", slower" if ratio < 0.985 else ", faster" if ratio > 1.015 else "")


def boundaries_table(boundaries: Sequence[Boundary], records: Sequence[Record]) -> Table | None:
    """Every boundary that the sweep has written, the null baselines' too."""
    columns = [
        Column("Series", lambda pair: pair[0].label),
        Column("Boundary N_B", lambda pair: "not reached" if pair[0].value is None else short(pair[0].value)),
        Column("Interval", lambda pair: pair[0].interval or MISSING),
        Column("Last on the plateau", lambda pair: nb(f"N_B = {pair[1].depth}") if pair[1] else MISSING),
        Column("Accuracy there", lambda pair: accuracy(pair[1]) if pair[1] else MISSING),
    ]
    found = [(item, item.last_record(records)) for item in boundaries]
    return table("Boundaries", columns, found) if found else None


def unfinished_table(cells: Sequence[Cell]) -> Table | None:
    """Cells without an evaluation, with what they have."""

    def done(cell: Cell) -> str:
        return ", ".join(stage for stage in STAGES if cell.run is not None and stage in cell.run.stages) or "none"

    columns = [
        Column("Cell", lambda cell: cell.name),
        Column("N_B", lambda cell: str(cell.depth)),
        Column("Method", lambda cell: METHODS.get(cell.method, cell.method), numeric=False),
        Column("Direction", lambda cell: DIRECTIONS.get(cell.direction, cell.direction), numeric=False),
        Column("State", lambda cell: "not started" if cell.run is None else "not finished", numeric=False),
        Column("Stages done", done, numeric=False),
    ]
    return table("Cells that are not finished", columns, cells) if cells else None


def details_table(dense: Record, records: Sequence[Record]) -> Table | None:
    """Bits saved, perplexities, benchmarks with their mean, angle and length of every run, the dense model first."""
    items = [item for item in records if item.benchmarks or item.residual or item.macro_drop is not None]
    if not items and not dense.benchmarks:
        return None
    items = [dense, *items]
    texts = texts_of(items)
    tasks = list(dict.fromkeys(name for item in items for name in item.benchmarks))
    angle, length = (
        lambda item, key=key: item.residual[key] if item.residual else None for key in ("angle", "norm_ratio")
    )
    columns = [
        Column("Run", lambda item: item.name),
        Column("N_B", lambda item: MISSING if item is dense else place(item)),
        Column("Bits saved", lambda item: fixed(item.bits_saved, 1), "%"),
        *perplexities(texts),
        Column("Macro drop", lambda item: fixed(item.macro_drop, 1), "points"),
        *(Column(name, lambda item, n=name: percent(item.benchmarks.get(n))) for name in tasks),
        Column("Angle", lambda item: fixed(angle(item), 1), "degrees"),
        Column("Length", lambda item: fixed(length(item)), "dense = 1"),
    ]
    known: Columns = {
        **{"run": "name", "N_B": "depth", "bits_saved_percent": "bits_saved"},
        **{name: lambda item, n=name: item.perplexity.get(n) for name in texts},
        "macro_drop": "macro_drop",
        **{name: lambda item, n=name: item.benchmarks.get(n) for name in tasks},
        **{"angle_degrees": angle, "norm_ratio": length},
    }
    caption = "Everything that was measured beside what is saved"
    return table("Details", columns, items, caption=caption, key="details", file="details.csv", data=data(items, known))
