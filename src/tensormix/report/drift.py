"""Figures of geometry drift: the landscape and its two summaries with the two-segment fit."""

from __future__ import annotations

from .figure import Figure
from .figures import DEPTH, SYMBOL, depth_range, draw_boundaries, whole
from .heat import heat_map
from .measures import Boundary, Record
from .numbers import number, short, text
from .read import Row
from .svg import Panel, Point, Style, padded


def drift_map(records: list[Record], boundaries: list[Boundary]) -> Figure | None:
    """Drift of inter-layer similarity: N_B x start layer (paper Fig. 4a)."""
    series = next((item.series for item in records if item.method == "mixt" and item.drift_profile), None)
    group = [item for item in records if item.series == series and item.drift_profile]
    values = {(item.depth or 0, layer): value for item in group for layer, value in item.drift_profile.items()}
    if not values:
        return None
    marks = [b for b in boundaries if b.series == group[0].series and b.value is not None]
    drawn = heat_map(
        values,
        title="Start layer",
        value_name="drift",
        description="Heat map of geometry drift: blocks replaced against start layer; values are in the table below",
        marks=[(b.value or 0.0, b.low, b.high) for b in marks],
    )
    rows = [[depth, layer, value] for (depth, layer), value in sorted(values.items())]
    explanation = (
        f"<p>How far the inner geometry of the model has moved ({text(group[0].label)}). For each pair of layers we "
        "take the cosine similarity of their hidden states just before the answer; <strong>drift</strong> is its "
        "absolute change against the dense model. Each square is the mean over all later layers for one start layer "
        f"(bottom: first layer) and one {SYMBOL}; dark is little drift, yellow is much.</p><p>Read it from left to "
        "right: drift that stays in few rows is local damage; drift that spreads over most rows past the dashed line "
        "is a change of the whole model.</p>"
    )
    return Figure(
        "drift-map", "Where the inner geometry drifts", [drawn], explanation, ["N_B", "start_layer", "drift"], rows
    )


FIT_KINDS = ("drift_fit", "drift_crossing")


def fit_lines(row: Row, low: float, high: float) -> list[tuple[float, float]] | None:
    """Corners of the two-segment fit between the depths low and high; None if the row does not hold one.

    `value` is the depth at which the two lines meet, `height` the drift there, slopes are per replaced block.
    """
    at, height, left, right = (number(row.get(key)) for key in ("value", "height", "slope_before", "slope_after"))
    if at is None or height is None or left is None or right is None:
        return None
    return [(low, height + left * (low - at)), (at, height), (high, height + right * (high - at))]


REGIONS = (
    ("all", "all layer pairs", Style("c-green", "circle")),
    ("output", "pairs near the output", Style("c-blue", "square")),
)


def drift_means(records: list[Record], boundaries: list[Boundary], rows: list[Row]) -> Figure | None:
    """Global and output-side mean drift against N_B with the two-segment fit (paper Fig. 4b)."""
    series = next((item.series for item in records if item.method == "mixt" and item.drift), None)
    group = [item for item in records if item.series == series and item.drift]
    data = [
        [item.depth, region, item.drift[region]] for item in group for region, *_ in REGIONS if region in item.drift
    ]
    if not data:
        return None
    panel = Panel(
        depth_range(group),
        padded([0.0, *(row[2] for row in data)]),
        title="Mean geometry drift",
        x_label=DEPTH,
        x_format=whole,
        description="Mean geometry drift against number of blocks replaced; values are in the table below",
    )
    draw_boundaries(panel, [b for b in boundaries if b.series == group[0].series])
    fits = [row for row in rows if row.get("kind") in FIT_KINDS and _same_series(row, group[0])]
    fits = [row for row in fits if row.get("region", "all") == "all"]
    corners = fit_lines(fits[0], 0.0, max(row[0] for row in data)) if fits else None
    if corners:
        panel.line(corners, Style("c-green fit"))
    for region, name, style in REGIONS:
        points = [Point(row[0], row[2], f"N_B = {row[0]}, {name}: {short(row[2])}") for row in data if row[1] == region]
        panel.points(points, style) if region == "all" else panel.series(points, style)
    fit = _fit_text(fits[0], corners) if fits else "No two-segment fit was written for this sweep."
    explanation = (
        "<p>Two summaries of the drift: the mean over all layer pairs (circles) and over the pairs near the output "
        f"(squares).</p><p>{fit}</p>"
    )
    legend = [(style, name) for region, name, style in REGIONS if any(row[1] == region for row in data)]
    return Figure(
        "drift-means", "Drift in two numbers", [panel.svg()], explanation, ["N_B", "region", "mean_drift"], data, legend
    )


def _same_series(row: Row, item: Record) -> bool:
    given = (
        row.get("method", item.method),
        row.get("direction", item.direction),
        row.get("num_branches", item.num_branches),
    )
    return given == item.series


def _fit_text(row: Row, corners: list[tuple[float, float]] | None) -> str:
    if corners is None:
        return "The sweep holds a two-segment fit without a kink: one line describes the drift as well as two."
    at, left, right = number(row.get("value")), number(row.get("slope_before")), number(row.get("slope_after"))
    low, high = number(row.get("low")), number(row.get("high"))
    interval = f" (interval {short(low)} to {short(high)})" if low is not None and high is not None else ""
    return (
        f"The thick line is the two-segment fit to all pairs: drift grows by {short(left)} per block up to {SYMBOL} = "
        f"{short(at)}{interval} and by {short(right)} per block after it. It is fitted to drift alone, so its kink "
        "need not fall on the boundary of accuracy; where both agree, the collapse is seen from the inside too."
    )
