"""Figures of what quality costs: perplexity and benchmark accuracy against bits saved, geometry against quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .figure import DENSE, Figure, Key, looks
from .figures import where
from .heat import ramp
from .measures import Record, by_series
from .numbers import fixed, percent, short, text
from .svg import Panel, Point, Style, padded

DIRECT = Style("c-ink", "circle", hollow=True)  # a run before its recovery
SAVED = "bits saved, % of the model without its embeddings"


def tradeoff_figure(dense: Record, records: Sequence[Record], styles: dict[Key, Style] | None = None) -> Figure | None:
    """Perplexity of each text, and the macro accuracy drop, against bits saved."""
    connected = styles is None  # separate runs are no path
    styles = looks(records) if styles is None else styles
    placed = [item for item in records if item.bits_saved is not None]
    panels, rows = [], []
    for name in dict.fromkeys(name for item in placed for name in item.perplexity):
        say = f"perplexity of {name}"
        level = dense.perplexity.get(name)
        drawn = _panel(placed, lambda i, n=name: i.perplexity.get(n), say, level, styles, connected, log=True)
        panels.append(drawn)
        rows += _rows(placed, name, lambda i, n=name: i.perplexity.get(n))
    dropped = [item for item in placed if item.macro_drop is not None]
    if dropped:
        say = "macro accuracy drop, points"
        panels.append(_panel(dropped, lambda i: i.macro_drop, say, 0.0, styles, connected, log=False))
        rows += _rows(dropped, "macro_drop", lambda i: i.macro_drop)
    if not rows:
        return None
    named = {item.series: item.label for item in placed}
    explanation = (
        "<p>Each mark is one run: to the right more is saved, lower is better; the thin line is the dense model. Bits "
        "are "
        "counted as they are stored, without the input embeddings. The <strong>macro accuracy drop</strong> is how "
        "many "
        "percentage points the unweighted mean accuracy over the benchmarks without worked examples lies below the "
        "dense "
        "model's. Where a run was also evaluated as it was compressed, before its recovery, an <strong>arrow</strong> "
        "leads from there to what recovery made of it: down is what it gained, to the left what it added to the "
        "stored bits (low-rank repair does).</p>"
    )
    legend = [(style, named[key]) for key, style in styles.items() if key in named]
    if any(row[3] == "direct" for row in rows):
        legend.append((DIRECT, "before recovery; the arrow ends at the same run after it"))
    columns = ["series", "N_B", "measure", "stage", "bits_saved_percent", "value"]
    return Figure("tradeoff", "Quality against bits saved", panels, explanation, columns, rows, legend)


def _before(
    placed: Sequence[Record], value: Callable[[Record], float | None]
) -> list[tuple[Record, tuple[float, float]]]:
    """(saved, value) before recovery of those runs of which it is known."""
    return [
        (item, (item.direct.bits_saved, y))
        for item in placed
        if item.direct is not None and item.direct.bits_saved is not None and (y := value(item.direct)) is not None
    ]


def _rows(placed: Sequence[Record], measure: str, value: Callable[[Record], float | None]) -> list[list[Any]]:
    """The values behind one panel: each run before its recovery, where that is known, and each as it is."""
    found = [[item.label, item.depth, measure, "direct", *begin] for item, begin in _before(placed, value)]
    ends = [(item, value(item)) for item in placed]
    return found + [[item.label, item.depth, measure, "end", item.bits_saved, y] for item, y in ends if y is not None]


def _panel(
    placed: Sequence[Record],
    value: Callable[[Record], float | None],
    say: str,
    level: float | None,
    styles: dict[Key, Style],
    connected: bool,
    log: bool,
) -> str:
    known = [(item, value(item)) for item in placed]
    before = _before(placed, value)
    known += [(item, y) for item, (_, y) in before]
    ends = [y for _, y in known if y is not None] + ([level] if level is not None else [])
    log = log and min(ends) > 0
    saved = [item.bits_saved or 0.0 for item in placed] + [x for _, (x, _) in before]
    title = f"{say[0].upper()}{say[1:]}"
    about = f"{title} against bits saved; values are in the table below"
    panel = Panel(
        padded([0.0, *saved]), padded(ends, log=log), title=title, x_label=SAVED, log_y=log, description=about
    )
    if level is not None:
        panel.horizontal(level, f"dense {short(level)}", "level", at_end=True)
    for item, begin in before:
        if (end := value(item)) is not None:
            panel.arrow(begin, (item.bits_saved or 0.0, end), styles[item.series])
        tip = f"{where(item)}, before recovery: {fixed(begin[0], 1)} % saved, {say} {short(begin[1])}"
        panel.points([Point(*begin, tip)], replace(DIRECT, colour=styles[item.series].colour), size=3.2)
    for key, group in by_series(placed).items():
        points = [
            Point(i.bits_saved or 0.0, y, f"{where(i)}: {fixed(i.bits_saved, 1)} % saved, {say} {short(y)}")
            for i in group
            if (y := value(i)) is not None
        ]
        points.sort(key=lambda point: point.x)
        (panel.series if connected else panel.points)(points, styles[key])
    return panel.svg()


def residual_figure(records: Sequence[Record], styles: dict[Key, Style] | None = None) -> Figure | None:
    """Angle and norm ratio of the residual stream after the last compressed block; colour is perplexity."""
    styles = looks(records) if styles is None else styles
    placed = [item for item in records if item.residual]
    if not placed:
        return None
    text_name = next((name for item in placed for name in item.perplexity), None)
    values = {i: i.perplexity[text_name] for i in placed if text_name in i.perplexity} if text_name else {}
    logs = [math.log(max(value, 1.0)) for value in values.values()] or [0.0]
    span = (max(logs) - min(logs)) or 1.0
    panel = Panel(
        padded([0.0, *(item.residual["angle"] for item in placed)]),
        padded([1.0, *(item.residual["norm_ratio"] for item in placed)]),
        title="Ratio of lengths, compressed to dense",
        x_label="angle to the dense residual stream, degrees",
        description="Residual stream: ratio of lengths against angle; values are in the table below",
    )
    panel.horizontal(1.0, "dense", "level", at_end=True)
    rows = []
    for item in placed:
        angle, ratio, own = item.residual["angle"], item.residual["norm_ratio"], values.get(item)
        colour = ramp((math.log(max(own, 1.0)) - min(logs)) / span) if own is not None else ""
        said = f", perplexity {short(own)}" if own is not None else ""
        size = 3.2 + min(max(item.bits_saved or 0.0, 0.0), 100.0) / 20
        tip = f"{where(item)}: {fixed(angle, 1)} degrees, length {fixed(ratio)}{said}"
        panel.points([Point(angle, ratio, tip)], styles[item.series], size=size, colour=colour)
        rows.append([item.label, item.depth, item.residual.get("block"), angle, ratio, own, item.bits_saved])
    scale = ""
    if values:
        colours = ",".join(ramp(share / 4) for share in range(5))
        bar = f'<span class="ramp" style="background:linear-gradient(90deg,{colours})"></span>'
        ends = (short(min(values.values())), short(max(values.values())))
        scale = (
            f'<p class="scale"><span>perplexity of {text(text_name)} {ends[0]}</span>{bar}<span>{ends[1]}</span></p>'
        )
    explanation = (
        "<p>How far the residual stream after the last compressed block has turned away from the dense model's, and "
        "how "
        "much shorter or longer it is: means over tokens. Runs that stay good stay at the left and near 1; larger "
        "marks "
        "save more bits.</p>"
    )
    columns = [
        "series",
        "N_B",
        "last_compressed_block",
        "angle_degrees",
        "norm_ratio",
        "perplexity",
        "bits_saved_percent",
    ]
    named = {item.series: item.label for item in placed}
    legend = [(style, named[key]) for key, style in styles.items() if key in named]
    title = "Geometry of the residual stream"
    return Figure("residual", title, [panel.svg()], explanation, columns, rows, legend, extra=scale)


# Linear trends over baseline models of many sizes, published for MMLU (arXiv 2605.25344, Fig. 3c, d): measure, name,
# line, and half the width of the band that we draw around it, as the paper does not say how wide its own is.
TRENDS = (
    ("output_entropy", "Output entropy (OE)", lambda accuracy: 1.20 - 1.30 * accuracy, 0.1),
    ("spread", "\u2212log10(1 \u2212 PE)", lambda accuracy: -0.90 + 4.87 * accuracy, 0.4),
)


def spread(item: Record) -> float | None:
    """-log10(1 - PE); None at PE = 1, where it is infinite."""
    pe = item.prediction_entropy
    return None if pe is None or pe >= 1 else -math.log10(1 - pe)


def entropy_trends(dense: Record, records: Sequence[Record], styles: dict[Key, Style] | None = None) -> Figure | None:
    """OE and -log10(1 - PE) against accuracy with the published trends of dense models behind."""
    styles = looks(records) if styles is None else styles
    all_items = [item for item in [dense, *records] if item.accuracy is not None]
    panels, rows = [], []
    for key, title, trend, half in TRENDS:
        read: Callable[[Record], float | None] = spread if key == "spread" else lambda i: i.output_entropy
        placed = [(item, y) for item in all_items if (y := read(item)) is not None]
        if not placed:
            continue
        low, high = padded([0.25, *(item.accuracy or 0.0 for item, _ in placed)])
        ends = [y for _, y in placed] + [trend(x) + side * half for x in (low, high) for side in (-1, 1)]
        about = f"{title} against accuracy; values are in the table below"
        panel = Panel((low, high), padded(ends), title=title, x_label="accuracy", x_format=lambda v: percent(v, 0),
                      description=about)  # fmt: skip
        panel.area([(x, trend(x) - half, trend(x) + half) for x in (low, high)], "interval")
        panel.line([(low, trend(low)), (high, trend(high))], Style("c-ink", hollow=True))
        for item, y in placed:
            tip = f"{where(item)}: accuracy {percent(item.accuracy)}, {title} {fixed(y)}"
            panel.points([Point(item.accuracy or 0.0, y, tip)], DENSE if item is dense else styles[item.series])
            rows.append(["dense" if item is dense else item.label, item.depth, key, item.accuracy, y,
                         trend(item.accuracy or 0.0)])  # fmt: skip
        panels.append(panel.svg())
    if not panels:
        return None
    explanation = (
        "<p>The dashed lines are the two linear trends that arXiv 2605.25344 states for baseline models of many "
        "sizes on MMLU with five examples: OE \u2248 1.20 \u2212 1.30 accuracy and \u2212log10(1 \u2212 PE) \u2248 "
        "\u22120.90 + 4.87 accuracy, accuracy as a fraction. It draws a band around each but gives neither its width "
        f"nor the points behind it. The bands here are \u00b1{TRENDS[0][3]:g} and \u00b1{TRENDS[1][3]:g}, our choice: "
        "they guide the eye and are no confidence interval. On another exam a model need not lie on the lines. A "
        "checkpoint that does fails like a smaller model; one that leaves them fails in a way of its own. Where "
        "PE is 1 the second value is infinite and not drawn.</p>"
    )
    named = {item.series: item.label for item in records}
    legend = [(DENSE, "dense model")] if dense.accuracy is not None else []
    legend += [(style, named[key]) for key, style in styles.items() if key in named]
    columns = ["series", "N_B", "measure", "accuracy", "value", "published_trend"]
    return Figure("entropy-trends", "Entropies beside the dense trends", panels, explanation, columns, rows, legend)
