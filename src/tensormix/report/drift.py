"""Figures of geometry drift: the landscape and its two summaries with the two-segment fit."""

from __future__ import annotations

from .boundary import Boundary
from .chart import chart
from .figure import Data, Figure, figure
from .measures import Record
from .numbers import number, short
from .parts import Cells, Line, Point, Series
from .read import Row
from .scales import Axis
from .series import DEPTH, boundary_marks
from .svg import Style

REGIONS = (
    ("all", "all layer pairs", Style("c-green", "circle")),
    ("output", "pairs near the output", Style("c-blue", "square")),
)


def first_series(records: list[Record], key: str) -> list[Record]:
    """The records of the first MixT series that has `key`, those that have it."""
    known = [item for item in records if getattr(item, key)]
    main = next((item.series for item in known if item.method == "mixt"), None)
    return [item for item in known if item.series == main]


def drift_map(records: list[Record], boundaries: list[Boundary]) -> Figure | None:
    """Drift of inter-layer similarity: N_B x start layer (paper Fig. 4a)."""
    group = first_series(records, "drift_profile")
    values = {(item.depth or 0, layer): value for item in group for layer, value in item.drift_profile.items()}
    if not values:
        return None
    cells = Cells(values, lambda depth, layer, value: f"N_B = {depth}, start layer {layer}: drift {short(value)}")
    marks = boundary_marks([b for b in boundaries if b.series == group[0].series])
    rows = Data(["N_B", "start_layer", "drift"], [[*place, value] for place, value in sorted(values.items())])
    drawn = [chart("Start layer", DEPTH, Axis(), [cells, *marks])]
    return figure("drift-map", "Where the inner geometry drifts", drawn, rows, label=group[0].label)


def drift_means(records: list[Record], boundaries: list[Boundary], rows: list[Row]) -> Figure | None:
    """Global and output-side mean drift against N_B with the two-segment fit (paper Fig. 4b)."""
    group = first_series(records, "drift")
    found = [
        [item.depth or 0, region, item.drift[region]]
        for item in group
        for region, *_ in REGIONS
        if region in item.drift
    ]
    if not found:
        return None
    fit = next((row for row in rows if row.get("kind") == "drift_crossing" and group[0].is_of(row)), None)
    corners = fit_lines(fit, 0.0, max(depth for depth, *_ in found)) if fit else None
    parts = [
        Series([Point(x, y, f"N_B = {x}, {name}: {short(y)}") for x, at, y in found if at == region], style, name,
               line=region != "all")
        for region, name, style in REGIONS
    ]  # fmt: skip
    lines = [Line(corners, Style("c-green fit"))] if corners else []
    marks = boundary_marks([b for b in boundaries if b.series == group[0].series])
    drawn = [chart("Mean geometry drift", DEPTH, Axis(include=(0.0,)), [*parts, *lines, *marks])]
    columns = ["N_B", "region", "mean_drift"]
    return figure("drift-means", "Drift in two numbers", drawn, Data(columns, found), fit=fit, drawn=bool(corners))


def fit_lines(row: Row, low: float, high: float) -> list[tuple[float, float]] | None:
    """Corners of the two-segment fit between the depths low and high; None if it has no kink.

    `value` is the depth at which the two lines meet, `height` the drift there, slopes are per replaced block.
    """
    at, height, left, right = (number(row[key]) for key in ("value", "height", "slope_before", "slope_after"))
    if at is None or height is None or left is None or right is None:
        return None
    return [(low, height + left * (low - at)), (at, height), (high, height + right * (high - at))]
