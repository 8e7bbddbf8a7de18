"""Figures of size: parameters of a layer against its width, loss against parameters beside a dense family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .figure import DENSE, ROLE_LOOKS, Figure
from .numbers import METHODS, count, fixed, number, short, text
from .read import Row, Run
from .svg import Panel, Point, Style, padded


def operator_figure(runs: Sequence[Run]) -> Figure | None:
    """Parameters of each compressed layer against the side of a square dense layer of its size."""
    groups: dict[str, dict[tuple[float, float], Row]] = {}
    for run in runs:
        for row in run.rows("compress"):
            dense, own = number(row.get("dense_parameters")), number(row.get("parameters"))
            if dense and own and row.get("role"):
                name = str(row["method"])
                branches = _branches(run) if name == "mixt" else None
                label = METHODS.get(name, name) + (f", {branches} branches" if branches else "")
                groups.setdefault(label, {})[math.sqrt(dense), own] = row
    places = [place for group in groups.values() for place in group]
    if not places:
        return None
    widths = [width for width, _ in places]
    panel = Panel(
        padded(widths, log=True),
        padded([own for _, own in places] + [width**2 for width in widths], log=True),
        title="Parameters of one layer",
        x_label="width of a square layer of that size",
        log_x=True,
        log_y=True,
        x_format=count,
        y_format=count,
        description="Parameters of each kind of layer against width; values are in the table below",
    )
    low, high = min(widths), max(widths)
    if low < high:
        panel.line([(low, low**2), (high, high**2)], Style("c-ink", hollow=True))
    panel.points([Point(w, w**2, f"dense: {count(w**2)}") for w in sorted(set(widths))], DENSE)
    legend, data = [(DENSE, "dense")], []
    for index, (label, group) in enumerate(groups.items()):
        style = ROLE_LOOKS[index % len(ROLE_LOOKS)]
        points = [
            Point(w, own, f"{label}, {row.get('role')}: {count(own)} of {count(w**2)}")
            for (w, own), row in sorted(group.items(), key=lambda item: item[0])
        ]
        panel.points(points, style)
        legend.append((style, label))
        data += [
            [label, row.get("role"), w, w**2, own, own / w**2]
            for (w, own), row in sorted(group.items(), key=lambda i: i[0])
        ]
    explanation = (
        "<p>What one layer keeps, as it was made in these runs; the dashed line is the dense layer. For MixT the "
        "distance "
        "between the two is the same at every width (4 branches: 6.25 % of the parameters).</p>"
    )
    columns = ["method", "role", "width", "dense_parameters", "parameters", "kept"]
    return Figure("operators", "Parameters of a layer", [panel.svg()], explanation, columns, data, legend)


def _branches(run: Run) -> Any:
    plan = run.recipe.get("plan") or []
    method = plan[0].get("method", {}) if plan and isinstance(plan[0], dict) else {}
    return method.get("num_branches")


def trend_figure(rows: Sequence[Row]) -> Figure | None:
    """Loss against parameters: the dense family with its trend, and the compressed descendants."""
    trend = next((row for row in rows if row.get("kind") == "scaling_trend"), None)
    points = [row for row in rows if row.get("kind") == "scaling"]
    if trend is None or not points:
        return None
    sizes = [row["parameters"] for row in points]
    low, high = padded(sizes, log=True)
    curve = [
        (n, trend["floor"] + trend["scale"] * n ** -trend["exponent"])
        for n in (low * (high / low) ** (step / 40) for step in range(41))
    ]
    panel = Panel(
        (low, high),
        padded([row["loss"] for row in points] + [loss for _, loss in curve]),
        title="Loss, nats per token",
        x_label="parameters",
        log_x=True,
        x_format=count,
        description="Loss against parameters; values are in the table below",
    )
    panel.line(curve, Style("c-ink", hollow=True))
    styles = {"dense": DENSE, "compressed": Style("c-red", "circle")}
    for row in points:
        tip = f"{row['model']}: {count(row['parameters'])}, loss {fixed(row['loss'])}, trend {fixed(row['expected'])}"
        panel.points([Point(row["parameters"], row["loss"], tip)], styles[row["family"]])
    legend = [(styles["dense"], "dense family"), (styles["compressed"], "compressed descendants")]
    explanation = (
        f"<p>The dashed line is {text(fixed(trend['floor']))} + {text(short(trend['scale']))} \u00b7 N to the power of "
        f"\u2212{text(fixed(trend['exponent']))}, fitted to {trend['num_models']} dense models (their root mean square "
        f"distance "
        f"from it is {text(short(trend['value']))}). A descendant below it loses less than a dense model of its size "
        f"would. The "
        "trend is of this text and this family alone.</p>"
    )
    columns = ["model", "family", "parameters", "loss", "expected", "residual"]
    data = [[row.get(name) for name in columns] for row in points]
    title = "Loss against parameters"
    return Figure("scaling", title, [panel.svg()], explanation, columns, data, legend)
