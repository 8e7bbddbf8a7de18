"""Figures of size: parameters of a layer against its width, loss against parameters beside a dense family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .chart import chart
from .figure import Data, Figure, data, figure
from .numbers import METHODS, count, fixed
from .parts import Line, Point, Series
from .read import Row, Run
from .scales import Axis, padded
from .series import DENSE, styles_in_order
from .svg import Style


def operator_figure(runs: Sequence[Run]) -> Figure | None:
    """Parameters of each compressed layer against the side of a square dense layer of its size."""
    groups: dict[str, dict[tuple[float, float], Row]] = {}
    for run in runs:
        for row in run.rows("compress"):
            if row["dense_parameters"] and row["parameters"] and row["role"]:
                branches = _branches(run) if row["method"] == "mixt" else None
                label = str(METHODS.get(row["method"], row["method"])) + (f", {branches} branches" if branches else "")
                groups.setdefault(label, {})[math.sqrt(row["dense_parameters"]), row["parameters"]] = row
    if not groups:
        return None
    places = [
        (label, row["role"], *place) for label, group in groups.items()
        for place, row in sorted(group.items(), key=lambda item: item[0])
    ]  # fmt: skip
    widths = sorted({width for *_, width, _ in places})
    parts = [
        Series([Point(w, own, f"{name}, {role}: {count(own)} of {count(w**2)}")
                for name, role, w, own in places if name == label], style, label)
        for label, style in styles_in_order(groups).items()
    ]  # fmt: skip
    dense = Series([Point(w, w**2, f"dense: {count(w**2)}") for w in widths], DENSE, "dense")
    line = Line([(w, w**2) for w in (widths[0], widths[-1])], Style("c-ink", hollow=True))
    axis = Axis("width of a square layer of that size", count, log=True)
    drawn = chart("Parameters of one layer", axis, Axis(format=count, log=True), [dense, *parts, line])
    columns = ["method", "role", "width", "dense_parameters", "parameters", "kept"]
    rows = [[label, role, w, w**2, own, own / w**2] for label, role, w, own in places]
    return figure("operators", "Parameters of a layer", [drawn], Data(columns, rows))


def _branches(run: Run) -> Any:
    plan = run.recipe.get("plan") or []
    method = plan[0].get("method", {}) if plan and isinstance(plan[0], dict) else {}
    return method.get("num_branches")


def trend_figure(rows: Sequence[Row]) -> Figure | None:
    """Loss against parameters: the dense family with its trend, and the compressed descendants."""
    trend = next((row for row in rows if row["kind"] == "scaling_trend"), None)
    found = [row for row in rows if row["kind"] == "scaling"]
    if trend is None or not found:
        return None
    low, high = padded([row["parameters"] for row in found], log=True)
    curve = [
        (n, trend["floor"] + trend["scale"] * n ** -trend["exponent"])
        for n in (low * (high / low) ** (step / 40) for step in range(41))
    ]
    looks = {"dense": (DENSE, "dense family"), "compressed": (Style("c-red"), "compressed descendants")}
    parts = [
        Series([Point(row["parameters"], row["loss"], f"{row['model']}: {count(row['parameters'])}, "
                      f"loss {fixed(row['loss'])}, trend {fixed(row['expected'])}")
                for row in found if row["family"] == family], style, name)
        for family, (style, name) in looks.items()
    ]  # fmt: skip
    line = Line(curve, Style("c-ink", hollow=True), counts=True)
    drawn = chart("Loss, nats per token", Axis("parameters", count, log=True, span=(low, high)), Axis(), [*parts, line])
    columns = ["model", "family", "parameters", "loss", "expected", "residual"]
    return figure("scaling", "Loss against parameters", [drawn], data(found, columns), trend=trend)
