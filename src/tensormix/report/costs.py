"""Figures of cost: accuracy against size and arithmetic, recovery loss, matching error per site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .figure import DENSE, ROLE_LOOKS, Figure, Key, looks
from .figures import SYMBOL, accuracy_words, tens, where, whole
from .heat import depth_colour
from .measures import Record, by_series
from .numbers import count, number, percent, plural, short, text
from .read import Row, Run, Sweep
from .svg import Panel, Point, Style, padded

MOST_POINTS = 120  # per loss curve; longer curves are averaged in equal groups of steps
AXES = (("parameters", "Parameters"), ("macs_per_token", "MACs per token"))


def size_figure(dense: Record, records: list[Record], styles: dict[Key, Style] | None = None) -> Figure | None:
    """Accuracy against parameters and against multiply-accumulates per token."""
    panels, connected = [], styles is None  # separate runs are no path away from the dense model
    styles = looks(records) if styles is None else styles
    for key, name in AXES:
        placed = [i for i in [dense, *records] if i.resource(key) is not None and i.accuracy is not None]
        if len(placed) < 2:
            continue
        ends = [v for i in placed for v in (i.accuracy, i.low, i.high) if v is not None]
        panel = Panel(
            padded([i.resource(key) or 0.0 for i in placed]),
            padded(ends),
            title=f"Exam accuracy against {name[0].lower() + name[1:] if name[1].islower() else name}",
            x_label=name,
            x_format=count,
            y_format=tens,
            description=f"Exam accuracy against {name}; values are in the table below",
        )
        groups = by_series(item for item in placed if item is not dense)
        for series in sorted(groups, key=lambda series: series[0] == "mixt"):
            points = [_size_point(item, key, name) for item in groups[series]]
            if connected and dense in placed and dense.accuracy is not None:
                panel.line([(dense.resource(key) or 0.0, dense.accuracy), (points[0].x, points[0].y)], styles[series])
            panel.series(points, styles[series])
        if dense in placed:
            panel.points([_size_point(dense, key, name)], DENSE)
        panels.append(panel.svg())
    if not panels:
        return None
    columns = ["series", "direction", "N_B", "parameters", "macs_per_token", "accuracy", "low", "high"]
    rows = [
        [
            "dense" if i is dense else i.label,
            i.direction,
            i.depth,
            i.resource("parameters"),
            i.resource("macs_per_token"),
            i.accuracy,
            i.low,
            i.high,
        ]
        for i in [dense, *records]
        if i.accuracy is not None and (i.resource("parameters") or i.resource("macs_per_token"))
    ]
    named = {r.series: r.label for r in records if r.accuracy is not None}
    legend = [(DENSE, "dense model")] if dense.accuracy is not None else []
    legend += [(style, named[key]) for key, style in styles.items() if key in named]
    explanation = (
        "<p>What is paid for what is kept: up and to the left is better. Parameters are all stored numbers of the "
        "model; a <strong>MAC</strong> is one multiply-and-add, counted exactly for the operators as they run. MixT "
        "saves fewer MACs than parameters, because each of its small matrices is applied to several slices of the "
        "input.</p>"
    )
    return Figure("size", "Accuracy against cost", panels, explanation, columns, rows, legend)


def _size_point(item: Record, key: str, name: str) -> Point:
    x = item.resource(key) or 0.0
    return Point(
        x, item.accuracy or 0.0, f"{where(item)}: {count(x)} {name}, {accuracy_words(item)}", item.low, item.high
    )


def thinned(rows: Sequence[Row]) -> list[tuple[float, float, int]]:
    """(step, loss, steps averaged): the rows themselves, or means over equal groups if there are too many."""
    pairs = [(number(row.get("step")), number(row.get("loss"))) for row in rows]
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
    values = [loss for curve in curves.values() for _, loss, _ in curve]
    log = min(values) > 0 and max(values) / min(values) > 20
    steps = [step for curve in curves.values() for step, *_ in curve]
    panel = Panel(
        (0, max(steps) * 1.02 or 1),
        padded(values, log=log),
        title="Recovery loss",
        x_label="training step",
        x_format=count,
        log_y=log,
        description="Recovery training loss against step, one line per depth; values are in the table below",
    )
    depths = [item.depth or 0 for item in group]
    for item, curve in reversed(curves.items()):
        share = (item.depth or 0) - min(depths)
        colour = depth_colour(share / (max(depths) - min(depths) or 1))
        panel.line([(step, loss) for step, loss, _ in curve], Style("curve"), colour)
        step, loss, _ = curve[-1]
        ends = Point(step, loss, f"N_B = {item.depth}: loss {short(loss)} at step {step:.0f}")
        panel.points([ends], Style("spot"), size=2.6)
    rows = [[item.label, item.depth, step, loss, num] for item, curve in curves.items() for step, loss, num in curve]
    scale = _depth_scale(min(depths), max(depths)) if len(curves) > 1 else ""
    averaged = max((num for curve in curves.values() for *_, num in curve), default=1)
    note = f" Curves are averaged over {plural(averaged, 'logged step')}." if averaged > 1 else ""
    which = f"one line for each {SYMBOL}, from orange for few blocks to blue for many" if scale else "one run"
    explanation = (
        f"<p>Training loss while the compressed model is healed ({text(group[0].label)}; {which}).{note}</p>"
        "<p>A line that still falls at its end means that the recovery budget, not the structure, may be what limits "
        "this depth.</p>"
    )
    columns = ["series", "N_B", "step", "loss", "logged_steps_averaged"]
    return Figure("recovery", "Recovery after compression", [panel.svg()], explanation, columns, rows, extra=scale)


def _depth_scale(low: int, high: int) -> str:
    colours = ",".join(depth_colour(share) for share in (0, 0.5, 1))
    ramp = f'<span class="ramp" style="background:linear-gradient(90deg,{colours})"></span>'
    return f'<p class="scale"><span>{SYMBOL} = {low}</span>{ramp}<span>{high}</span></p>'


def matching_source(source: Run | Sweep) -> Run | None:
    """The run whose compress rows show the most sites: of a sweep, the deepest MixT cell."""
    if isinstance(source, Run):
        return source
    cells = [c for c in source.cells if c.method == "mixt" and c.run is not None and c.run.rows("compress")]
    best = max(cells, key=lambda cell: (cell.direction == "last", cell.depth), default=None)
    return best.run if best else None


def _roles(rows: Iterable[Row]) -> list[str]:
    order = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
    found = list(dict.fromkeys(str(row.get("role") or "other") for row in rows))
    return sorted(found, key=lambda role: (order.index(role) if role in order else len(order), role))


def matching_figure(run: Run | None) -> Figure | None:
    """Relative error of each replaced site before recovery, by block and role."""
    rows: list[dict[str, Any]] = [
        row
        for row in (run.rows("compress") if run else [])
        if number(row.get("relative_error")) is not None and isinstance(row.get("block"), int)
    ]
    if not rows or run is None:
        return None
    blocks = [row["block"] for row in rows]
    room = max((max(blocks) - min(blocks)) * 0.05, 0.5)
    panel = Panel(
        (min(blocks) - room, max(blocks) + room),
        padded([row["relative_error"] for row in rows]),
        title="Relative matching error",
        x_label="block",
        x_format=whole,
        description="Relative matching error of each replaced site against its block; values are in the table below",
    )
    roles = _roles(rows)
    legend = [(ROLE_LOOKS[i % len(ROLE_LOOKS)], role) for i, role in enumerate(roles)]
    for style, role in legend:
        group = sorted((row for row in rows if str(row.get("role") or "other") == role), key=lambda row: row["block"])
        panel.points(
            [Point(r["block"], r["relative_error"], f"{r.get('site')}: {percent(r['relative_error'])}") for r in group],
            style,
        )
    explanation = (
        f"<p>How far each replaced layer is from the dense one <em>before</em> recovery (checkpoint {text(run.name)}): "
        "the norm of the difference divided by the norm of the original. 0 is a perfect copy, 1 is no better than "
        "zero.</p><p>Values near 1 are normal for MixT: it keeps a small part of a matrix that has no structure. What "
        "makes the model work again is the recovery, which is why the zeroed baseline must always be shown beside "
        "it.</p>"
    )
    columns = ["site", "block", "role", "method", "relative_error", "dense_parameters", "parameters"]
    data = [
        [row.get(name) for name in columns]
        for row in sorted(rows, key=lambda row: (row["block"], str(row.get("role"))))
    ]
    return Figure("matching", "Matching error before recovery", [panel.svg()], explanation, columns, data, legend)
