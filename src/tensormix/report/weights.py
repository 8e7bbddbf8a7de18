"""Figures of what is inside the dense model: sensitivity of blocks, restored entries, spectra, the gap to the bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figure import ROLE_LOOKS, Figure
from .figures import whole
from .numbers import fixed, number, percent, short, text
from .read import Row, Run
from .svg import Panel, Point, Style, padded

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


def sensitivity_figure(rows: Sequence[Row], change: str) -> Figure | None:
    """Perplexity against the one block that was changed."""
    found = [row for row in rows if row.get("change") == change and (number(row.get("value")) or 0) > 0]
    if not found:
        return None
    key, title = CHANGES[change]
    level = number(found[0].get("whole")) or 1.0
    panel = Panel(
        padded([row["block"] for row in found]),
        padded([level, *(row["value"] for row in found)], log=True),
        title=title,
        x_label="block, counted from 0",
        x_format=whole,
        log_y=True,
        description=f"{title}; values are in the table below",
    )
    panel.horizontal(level, f"whole model {short(level)}", "level", at_end=True)
    points = [Point(row["block"], row["value"], f"block {row['block']}: {short(row['value'])}") for row in found]
    panel.series(points, Style("c-blue", "circle"))
    said = "left out" if change == "drop" else "compressed as the plan says"
    explanation = (
        f"<p>In turn each block alone is {said}, all others stay dense. Where the mark lies on the thin line the model "
        "does not miss it; the axis is logarithmic.</p>"
    )
    data = [[row["block"], row["value"], row.get("loss"), level] for row in found]
    return Figure(key, title, [panel.svg()], explanation, ["block", "perplexity", "loss", "whole_model"], data)


def restoration_figure(rows: Sequence[Row]) -> Figure | None:
    """Where the tracked entries lie, and the fraction that a truncated SVD gives back against its rank."""
    entries = [row for row in rows if row.get("kind") == "tracked_entry"]
    curves = [row for row in rows if row.get("kind") == "restoration"]
    if not curves:
        return None
    legend = [(style, name) for key, (name, style) in SETS.items() if any(row["set"] == key for row in curves)]
    places = Panel(
        padded([row["column"] for row in entries] or [0, 1]),
        padded([row["row"] for row in entries] or [0, 1]),
        title="Row of the tracked entries",
        x_label="column (input)",
        description="Positions of the tracked entries in the weight; values are in the table below",
    )
    restored = Panel(
        padded([0, *(row["rank"] for row in curves)]),
        (-0.04, 1.06),
        title="Fraction restored",
        x_label="rank of the truncated SVD",
        y_format=lambda value: percent(value, 0),
        description="Fraction of tracked entries restored against rank; values are in the table below",
    )
    for key, (name, style) in SETS.items():
        places.points(
            [
                Point(
                    r["column"],
                    r["row"],
                    f"{name}: ({r['row']}, {r['column']}) = {short(r['value'])}, rank {r['rank']}",
                )
                for r in entries
                if r["set"] == key
            ],
            style,
            size=3.4,
        )
        restored.series(
            [
                Point(row["rank"], row["value"], f"{name}, rank {row['rank']}: {percent(row['value'])}")
                for row in curves
                if row["set"] == key
            ],
            style,
        )
    data: list[list[Any]] = [[r["set"], r["rank"], r["value"], None, None] for r in curves]
    data += [[r["set"], r["rank"], r["value"], r["row"], r["column"]] for r in entries]
    explanation = (
        f"<p>Entries of <code>{text(curves[0].get('site'))}</code>. An entry is restored at a rank if, from there on, "
        f"the "
        f"truncated SVD holds it within {percent(number(curves[0].get('tolerance')), 0)} of its size (of the weight's "
        f"root "
        "mean square, where it is smaller).</p><p>What rises only near the full rank is lost by every low-rank method "
        "that "
        "goes by the weight alone.</p>"
    )
    columns = ["set", "rank", "fraction_restored_or_value", "row", "column"]
    panels = [places.svg(), restored.svg()]
    return Figure("restoration", "Entries that a low rank gives back", panels, explanation, columns, data, legend)


MODES = ("weight", "expert", "output", "input")


def spectra_figure(rows: Sequence[Row]) -> Figure | None:
    """Exponents of the singular values' power law by block, a mark for each site and unfolding."""
    found = [row for row in rows if row.get("kind") == "spectrum" and number(row.get("exponent")) is not None]
    if not found:
        return None
    panels = []
    roles = sorted({str(row.get("role") or "other") for row in found})
    legend = [(ROLE_LOOKS[i % len(ROLE_LOOKS)], role) for i, role in enumerate(roles)]
    ends = padded([0.0, 0.5, *(row["exponent"] for row in found)])
    for mode in MODES:
        group = [row for row in found if row["mode"] == mode]
        if not group:
            continue
        name = "Exponent of each weight" if mode == "weight" else f"Exponent of the {mode} unfolding"
        about = f"{name} against block; values are in the table below"
        panel = Panel(padded([row["block"] for row in group]), ends, title=name, x_label="block, counted from 0",
                      x_format=whole, description=about)  # fmt: skip
        panel.horizontal(0.5, "1/2", "level", at_end=True)
        for style, role in legend:
            own = [row for row in group if str(row.get("role") or "other") == role]
            panel.points([Point(r["block"], r["exponent"], _exponent_words(r)) for r in own], style)
        panels.append(panel.svg())
    explanation = (
        "<p>Singular values fall like <em>i</em> to the power of minus this exponent, fitted on the stated range of "
        "<em>i</em> (r\u00b2 says how well). Below 1/2 most of the squared norm lies in the tail, and what a "
        "truncation throws "
        "away grows with the width.</p>"
    )
    columns = ["site", "block", "role", "mode", "exponent", "r_squared", "first", "last", "num_values"]
    data = [[row.get(name) for name in columns] for row in found]
    return Figure("spectra", "How heavy the tails of the spectra are", panels, explanation, columns, data, legend)


def _exponent_words(row: Row) -> str:
    return (
        f"{row['site']}, {row['mode']}: {fixed(row['exponent'])} on {row['first']} to {row['last']}, "
        f"r\u00b2 {fixed(number(row.get('r_squared')))}"
    )


def gap_figure(rows: Sequence[Row]) -> Figure | None:
    """Spectral error of each compressed weight over the best possible, beside its bound."""
    found = [row for row in rows if row.get("kind") == "spectral_gap" and (number(row.get("value")) or 0) > 0]
    if not found:
        return None
    values = [row["value"] for row in found] + [row["bound"] for row in found]
    panel = Panel(
        padded([row["block"] for row in found]),
        padded([1.0, *values], log=True),
        title="Spectral error / best possible",
        x_label="block, counted from 0",
        x_format=whole,
        log_y=True,
        description="Spectral error of compressed weights against block with its bound; values are in the table below",
    )
    panel.horizontal(1.0, "best matrix of that rank", "level", at_end=True)
    looks = (("value", "measured", Style("c-blue", "circle")), ("bound", "bound", Style("c-orange", "cross")))
    for key, name, style in looks:
        panel.points([Point(r["block"], r[key], f"{r['site']}, {name}: {short(r[key])}") for r in found], style)
    explanation = (
        "<p>The largest error that a compressed weight makes on any input, in units of what the best matrix of the "
        "same rank "
        "would make; crosses are the bound that holds for a quasi-optimal truncation of that rank.</p>"
    )
    columns = ["site", "block", "mode", "rank", "rank_of", "order", "value", "bound"]
    data = [[row.get(name) for name in columns] for row in found]
    legend = [(style, name) for _, name, style in looks]
    return Figure("spectral-gap", "Spectral error beside its bound", [panel.svg()], explanation, columns, data, legend)


def weight_figures(runs: Sequence[Run]) -> list[Figure | None]:
    """All of them, each from the first run that has measured it; the gap from that which compressed the most."""

    def rows(kind: str, **wanted: Any) -> list[Row]:
        for run in runs:
            found = [row for row in run.rows("diagnose", kind) if all(row.get(k) == v for k, v in wanted.items())]
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
