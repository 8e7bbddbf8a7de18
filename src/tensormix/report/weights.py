"""Figures of what is inside the dense model: sensitivity of blocks, restored entries, spectra, the gap to the bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .chart import chart
from .figure import Figure, data, figure
from .numbers import fixed, number, percent, short, whole_percent
from .parts import Level, Point, Series
from .read import Row, Run
from .scales import Axis
from .series import BLOCK, styles_in_order
from .svg import Style

CHANGES = {
    "drop": ("block-drop", "Perplexity with one block dropped"),
    "compress": ("block-compress", "Perplexity with one block compressed"),
}
SETS = {
    "inlier": ("random inliers", Style("c-ink", "plus")),
    "top_magnitude": ("largest entries", Style("c-blue", "circle")),
    "activation_weighted": ("activation-weighted", Style("c-orange", "square")),
    "super_weight": ("super weights", Style("c-red", "star")),
}
MODES = ("weight", "expert", "output", "input")
GAPS = (("value", "measured", Style("c-blue", "circle")), ("bound", "bound", Style("c-orange", "cross")))


def sensitivity_figure(rows: Sequence[Row], change: str) -> Figure | None:
    """Perplexity against the one block that was changed."""
    found = [row for row in rows if row["change"] == change and (number(row["value"]) or 0) > 0]
    if not found:
        return None
    key, title = CHANGES[change]
    level = found[0]["whole"]
    points = [Point(row["block"], row["value"], f"block {row['block']}: {short(row['value'])}") for row in found]
    parts = [Series(points, Style("c-blue", "circle"), line=True), Level(level, f"whole model {short(level)}")]
    columns = {"block": "block", "perplexity": "value", "loss": "loss", "whole_model": lambda row: level}
    drawn = [chart(title, BLOCK, Axis(log=True), parts)]
    return figure(key, title, drawn, data(found, columns), caption="sensitivity", change=change)


def restoration_figure(rows: Sequence[Row]) -> Figure | None:
    """Where the tracked entries lie, and the fraction that a truncated SVD gives back against its rank."""
    entries = [row for row in rows if row["kind"] == "tracked_entry"]
    curves = [row for row in rows if row["kind"] == "restoration"]
    if not curves:
        return None

    def place(row: Row, name: str) -> Point:
        at = f"({row['row']}, {row['column']})"
        return Point(row["column"], row["row"], f"{name}: {at} = {short(row['value'])}, rank {row['rank']}", size=3.4)

    def restored(row: Row, name: str) -> Point:
        return Point(row["rank"], row["value"], f"{name}, rank {row['rank']}: {percent(row['value'])}")

    places, lines = (
        [
            Series([point(row, name) for row in found if row["set"] == key], style, name, line=line)
            for key, (name, style) in SETS.items()
            if any(row["set"] == key for row in found)
        ]
        for found, point, line in ((entries, place, False), (curves, restored, True))
    )
    share = Axis(format=whole_percent, include=(0.0, 1.0), room=0.05)
    charts = [chart("Row of the tracked entries", Axis("column (input)"), Axis(), places)] if places else []
    charts.append(chart("Fraction restored", Axis("rank of the truncated SVD", include=(0.0,)), share, lines))
    columns = {
        "set": "set",
        "rank": "rank",
        "fraction_restored_or_value": "value",
        "row": lambda row: row.get("row"),
        "column": lambda row: row.get("column"),
    }
    known = data([*curves, *entries], columns)
    title, tolerance = "Entries that a low rank gives back", number(curves[0]["tolerance"])
    return figure("restoration", title, charts, known, site=curves[0]["site"], tolerance=tolerance)


def spectra_figure(rows: Sequence[Row]) -> Figure | None:
    """Exponents of the singular values' power law by block, a mark for each site and unfolding."""
    found = [row for row in rows if number(row["exponent"]) is not None]
    charts = []
    exponents = Axis(include=(0.0, *(row["exponent"] for row in found)))  # the same for all
    styles = styles_in_order(sorted({row["role"] or "other" for row in found}))
    for mode in MODES:
        group = [row for row in found if row["mode"] == mode]
        parts = [
            Series([Point(row["block"], row["exponent"], _exponent_words(row))
                    for row in group if (row["role"] or "other") == role], style, role)
            for role, style in styles.items()
        ]  # fmt: skip
        if group:
            title = "Exponent of each weight" if mode == "weight" else f"Exponent of the {mode} unfolding"
            charts.append(chart(title, BLOCK, exponents, [*parts, Level(0.5, "1/2")]))
    columns = ["site", "block", "role", "mode", "exponent", "r_squared", "first", "last", "num_values"]
    return figure("spectra", "How heavy the tails of the spectra are", charts, data(found, columns))


def _exponent_words(row: Row) -> str:
    return (
        f"{row['site']}, {row['mode']}: {fixed(row['exponent'])} on {row['first']} to {row['last']}, "
        f"r\u00b2 {fixed(number(row['r_squared']))}"
    )


def gap_figure(rows: Sequence[Row]) -> Figure | None:
    """Spectral error of each compressed weight over the best possible, beside its bound."""
    found = [row for row in rows if (number(row["value"]) or 0) > 0]
    if not found:
        return None
    parts = [
        Series(
            [Point(row["block"], row[key], f"{row['site']}, {name}: {short(row[key])}") for row in found], style, name
        )
        for key, name, style in GAPS
    ]
    level = Level(1.0, "best matrix of that rank")
    drawn = [chart("Spectral error / best possible", BLOCK, Axis(log=True), [*parts, level])]
    columns = ["site", "block", "mode", "rank", "rank_of", "order", "value", "bound"]
    return figure("spectral-gap", "Spectral error beside its bound", drawn, data(found, columns))


def weight_figures(runs: Sequence[Run]) -> list[Figure | None]:
    """All of them, each from the first run that has measured it; the gap from that which compressed the most."""

    def rows(kind: str, **wanted: Any) -> list[Row]:
        for run in runs:
            found = [row for row in run.rows("diagnose", kind) if all(row[k] == v for k, v in wanted.items())]
            if found:
                return found
        return []

    gaps = [run.rows("diagnose", "spectral_gap") for run in runs]
    return [
        sensitivity_figure(rows("sensitivity", change="drop"), "drop"),
        sensitivity_figure(rows("sensitivity", change="compress"), "compress"),
        restoration_figure([*rows("restoration"), *rows("tracked_entry")]),
        spectra_figure(rows("spectrum")),
        gap_figure(max(gaps, key=len, default=[])),
    ]
