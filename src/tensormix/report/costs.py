"""Figures of cost: accuracy against size and arithmetic, recovery loss, matching error per site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .chart import chart
from .figure import ColourScale, Data, Figure, data, figure
from .measures import Record, by_series
from .numbers import count, number, percent, short, whole_percent
from .parts import Line, Point, Series
from .read import Row, Run, Sweep
from .scales import Axis, depth_colour
from .series import BLOCK, Styles, accuracy_words, point, series_of, styles_in_order, styles_of
from .svg import Style

MOST_POINTS = 120  # per loss curve; longer curves are averaged in equal groups of steps
COSTS = (
    ("parameters", "Parameters", "Exam accuracy against parameters"),
    ("macs_per_token", "MACs per token", "Exam accuracy against MACs per token"),
)


def size_figure(dense: Record, records: list[Record], styles: Styles | None = None) -> Figure | None:
    """Accuracy against parameters and against multiply-accumulates per token."""
    line = styles is None  # separate runs are no path away from the dense model
    styles = styles_of(records) if styles is None else styles
    charts = []
    for key, name, title in COSTS:

        def place(item: Record, key: str = key, name: str = name) -> Point | None:
            cost = item.resource(key)
            return point(item, cost, item.accuracy, f"{count(cost)} {name}, {accuracy_words(item)}", interval=True)

        if sum(place(item) is not None for item in (dense, *records)) > 1:
            parts = series_of(dense, records, styles, place, line)
            charts.append(chart(title, Axis(name, count), Axis(format=whole_percent), parts))
    columns = {"series": "label", "direction": "direction", "N_B": "depth"}
    columns |= {key: lambda item, key=key: item.resource(key) for key, *_ in COSTS}
    columns |= {name: name for name in ("accuracy", "low", "high")}
    known = [i for i in (dense, *records) if i.accuracy is not None and any(i.resource(key) for key, *_ in COSTS)]
    return figure("size", "Accuracy against cost", charts, data(known, columns))


def thinned(rows: Sequence[Row]) -> list[tuple[float, float, int]]:
    """(step, loss, steps averaged): the rows themselves, or means over equal groups if there are too many."""
    pairs = [(number(row["step"]), number(row["loss"])) for row in rows]
    known = [(step, loss) for step, loss in pairs if step is not None and loss is not None]
    size = -(-len(known) // MOST_POINTS) or 1
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g), len(g)) for g in groups]


def loss_figure(records: Sequence[Record]) -> Figure | None:
    """Recovery loss against step, one line per depth of the main series."""
    groups = by_series(item for item in records if thinned(item.losses))
    if not groups:
        return None
    group = next(iter(groups.values()))
    curves = {item: thinned(item.losses) for item in group}
    depths = [item.depth or 0 for item in group]
    span = (max(depths) - min(depths)) or 1
    parts = []
    for item, curve in curves.items():
        colour = depth_colour(((item.depth or 0) - min(depths)) / span)
        step, loss, _ = curve[-1]
        end = Point(step, loss, f"N_B = {item.depth}: loss {short(loss)} at step {step:.0f}", size=2.6)
        parts += [Series([end], Style("spot")), Line([(x, y) for x, y, _ in curve], Style("curve"), "", colour, True)]
    values = [loss for curve in curves.values() for _, loss, _ in curve]
    log = min(values) > 0 and max(values) / min(values) > 20
    steps = Axis("training step", count, include=(0.0,), room=0.02)
    averaged = max(num for curve in curves.values() for *_, num in curve)
    ends = (f"N_B = {min(depths)}", str(max(depths)))
    return figure(
        "recovery",
        "Recovery after compression",
        [chart("Recovery loss", steps, Axis(log=log), parts)],
        Data(
            ["series", "N_B", "step", "loss", "logged_steps_averaged"],
            [[item.label, item.depth, *values] for item, curve in curves.items() for values in curve],
        ),
        ColourScale(ends[0], [depth_colour(share) for share in (0, 0.5, 1)], ends[1]) if len(curves) > 1 else None,
        label=group[0].label,
        several=len(curves) > 1,
        averaged=averaged,
    )


def matching_source(source: Run | Sweep) -> Run | None:
    """The run whose compress rows show the most sites: of a sweep, the deepest MixT cell."""
    if isinstance(source, Run):
        return source
    cells = [c for c in source.cells if c.method == "mixt" and c.run is not None and c.run.rows("compress")]
    best = max(cells, key=lambda cell: (cell.direction == "last", cell.depth), default=None)
    return best.run if best else None


def _roles(rows: Iterable[Row]) -> list[str]:
    order = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
    found = list(dict.fromkeys(row["role"] or "other" for row in rows))
    return sorted(found, key=lambda role: (order.index(role) if role in order else len(order), role))


def matching_figure(run: Run | None) -> Figure | None:
    """Relative error of each replaced site before recovery, by block and role."""
    rows = [
        row
        for row in (run.rows("compress") if run else [])
        if number(row["relative_error"]) is not None and row["block"] is not None
    ]
    if not rows or run is None:
        return None
    rows.sort(key=lambda row: (row["block"], str(row["role"])))
    series = [
        Series([Point(row["block"], row["relative_error"], f"{row['site']}: {percent(row['relative_error'])}")
                for row in rows if (row["role"] or "other") == role], style, role)
        for role, style in styles_in_order(_roles(rows)).items()
    ]  # fmt: skip
    columns = ["site", "block", "role", "method", "relative_error", "dense_parameters", "parameters"]
    drawn = [chart("Relative matching error", BLOCK, Axis(), series)]
    return figure("matching", "Matching error before recovery", drawn, data(rows, columns), name=run.name)
