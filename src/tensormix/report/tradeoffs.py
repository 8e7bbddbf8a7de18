"""Figures of what quality costs: perplexity and benchmark accuracy against bits saved, geometry against quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .chart import Chart, chart
from .figure import ColourScale, Data, Figure, data, figure
from .measures import Record
from .numbers import fixed, percent, short, whole_percent
from .parts import Area, Arrow, Level, Line, Part, Point, Series
from .scales import Axis, ramp
from .series import Styles, point, series_of, styles_of
from .svg import Style

DIRECT = Style("c-ink", "circle", hollow=True)  # a run before its recovery
SAVED = Axis("bits saved, % of the model without its embeddings", include=(0.0,))
Value = Callable[[Record], float | None]


def tradeoff_figure(dense: Record, records: Sequence[Record], styles: Styles | None = None) -> Figure | None:
    """Perplexity of each text, and the macro accuracy drop, against bits saved."""
    line = styles is None  # separate runs are no path
    styles = styles_of(records) if styles is None else styles
    placed = [item for item in records if item.bits_saved is not None]
    values: dict[str, tuple[str, Value, float | None]] = {
        name: (f"perplexity of {name}", lambda i, name=name: i.perplexity.get(name), dense.perplexity.get(name))
        for name in dict.fromkeys(name for item in placed for name in item.perplexity)
    }
    if any(item.macro_drop is not None for item in placed):
        values["macro_drop"] = ("macro accuracy drop, points", lambda item: item.macro_drop, 0.0)
    charts = [_tradeoff(placed, value, say, level, styles, line) for say, value, level in values.values()]
    columns = ["series", "N_B", "measure", "stage", "bits_saved_percent", "value"]
    rows = [row for name, (_, value, _) in values.items() for row in _rows(placed, name, value)]
    return figure("tradeoff", "Quality against bits saved", charts, Data(columns, rows))


def _before(placed: Sequence[Record], value: Value) -> list[tuple[Record, tuple[float, float]]]:
    """(saved, value) before recovery of those runs of which it is known."""
    return [
        (item, (item.direct.bits_saved, y))
        for item in placed
        if item.direct is not None and item.direct.bits_saved is not None and (y := value(item.direct)) is not None
    ]


def _rows(placed: Sequence[Record], measure: str, value: Value) -> list[list[Any]]:
    """The values behind one chart: each run before its recovery, where that is known, and each as it is."""
    found = [[item.label, item.depth, measure, "direct", *begin] for item, begin in _before(placed, value)]
    ends = [(item, value(item)) for item in placed]
    return found + [[item.label, item.depth, measure, "end", item.bits_saved, y] for item, y in ends if y is not None]


def _tradeoff(
    placed: Sequence[Record], value: Value, say: str, level: float | None, styles: Styles, line: bool
) -> Chart:
    parts: list[Part] = [
        *series_of(
            None, placed, styles,
            lambda i: point(i, i.bits_saved, value(i), f"{fixed(i.bits_saved, 1)} % saved, {say} {short(value(i))}"),
            line,
        )
    ]  # fmt: skip
    arrows = []
    for item, begin in _before(placed, value):
        tip = f"{fixed(begin[0], 1)} % saved before recovery, {say} {short(begin[1])}"
        mark = point(item, *begin, tip)
        style = styles[item.series]
        parts += [Series([mark._replace(size=3.2)], replace(DIRECT, colour=style.colour))] if mark else []
        if (end := value(item)) is not None:
            arrows.append(Arrow(begin, (item.bits_saved or 0.0, end), style))
    parts += arrows
    parts += [Series([], DIRECT, "before recovery; the arrow ends at the same run after it")] if arrows else []
    parts += [Level(level, f"dense {short(level)}")] if level is not None else []
    return chart(f"{say[0].upper()}{say[1:]}", SAVED, Axis(log=True), parts)


def residual_figure(records: Sequence[Record], styles: Styles | None = None) -> Figure | None:
    """Angle and norm ratio of the residual stream after the last compressed block; colour is perplexity."""
    styles = styles_of(records) if styles is None else styles
    placed = [item for item in records if item.residual]
    if not placed:
        return None
    name = next((name for item in placed for name in item.perplexity), "")
    logs = {item: math.log(max(item.perplexity[name], 1.0)) for item in placed if name in item.perplexity}
    least, most = min(logs.values(), default=0.0), max(logs.values(), default=0.0)

    def place(item: Record) -> Point | None:
        angle, ratio = item.residual["angle"], item.residual["norm_ratio"]
        tip = f"{fixed(angle, 1)} degrees, length {fixed(ratio)}"
        found = point(
            item, angle, ratio, tip + (f", perplexity {short(item.perplexity[name])}" if item in logs else "")
        )
        size = 3.2 + min(max(item.bits_saved or 0.0, 0.0), 100.0) / 20
        colour = ramp((logs[item] - least) / ((most - least) or 1.0)) if item in logs else ""
        return found and found._replace(size=size, colour=colour)

    parts = [*series_of(None, placed, styles, place, line=False), Level(1.0, "dense")]
    angles = Axis("angle to the dense residual stream, degrees", include=(0.0,))
    values = [item.perplexity[name] for item in logs]
    colours = [ramp(share / 4) for share in range(5)]
    scale = ColourScale(f"perplexity of {name} {short(min(values))}", colours, short(max(values))) if values else None
    columns = {
        "series": "label",
        "N_B": "depth",
        "last_compressed_block": lambda item: item.residual["block"],
        "angle_degrees": lambda item: item.residual["angle"],
        "norm_ratio": lambda item: item.residual["norm_ratio"],
        "perplexity": lambda item: item.perplexity.get(name),
        "bits_saved_percent": "bits_saved",
    }
    drawn = [chart("Ratio of lengths, compressed to dense", angles, Axis(), parts)]
    return figure("residual", "Geometry of the residual stream", drawn, data(placed, columns), scale)


# Linear trends over baseline models of many sizes, published for MMLU (arXiv 2605.25344, Fig. 3c, d): measure, name,
# line, and half the width of the band that we draw around it, as the paper does not say how wide its own is.
TRENDS = (
    ("output_entropy", "Output entropy (OE)", lambda accuracy: 1.20 - 1.30 * accuracy, 0.1),
    ("spread", "\u2212log10(1 \u2212 PE)", lambda accuracy: -0.90 + 4.87 * accuracy, 0.4),
)


def entropy_trends(dense: Record, records: Sequence[Record], styles: Styles | None = None) -> Figure | None:
    """OE and -log10(1 - PE) against accuracy with the published trends of dense models behind."""
    styles = styles_of(records) if styles is None else styles
    charts, rows = [], []
    known = [item for item in (dense, *records) if item.accuracy is not None]
    for key, title, trend, half in TRENDS:

        def place(item: Record, key: str = key, title: str = title) -> Point | None:
            y = getattr(item, key)
            return point(item, item.accuracy, y, f"accuracy {percent(item.accuracy)}, {title} {fixed(y)}")

        accuracies = Axis("accuracy", whole_percent, include=(0.25,))
        measured = [(item, found) for item in known if (found := place(item)) is not None]
        if not measured:
            continue
        span = accuracies.range([found.x for _, found in measured])
        area = Area([(x, trend(x) - half, trend(x) + half) for x in span])
        line = Line([(x, trend(x)) for x in span], Style("c-ink", hollow=True))
        parts = [*series_of(dense, records, styles, place, line=False), line, area]
        charts.append(chart(title, accuracies._replace(span=span), Axis(), parts))
        rows += [[item.label, item.depth, key, found.x, found.y, trend(found.x)] for item, found in measured]
    columns = ["series", "N_B", "measure", "accuracy", "value", "published_trend"]
    title = "Entropies beside the dense trends"
    return figure("entropy-trends", title, charts, Data(columns, rows), widths=[half for *_, half in TRENDS])
