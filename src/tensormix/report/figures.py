"""Figures of a sweep against depth: accuracy and answer entropies, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .figure import DENSE, Figure, Key, looks
from .measures import CHANCE, Boundary, Record, by_series
from .numbers import NARROW, fixed, nb, percent, plural, short
from .svg import Panel, Point, Style, padded

DEPTH = "N_B, number of blocks replaced"
SYMBOL = nb("N_B")


def whole(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 1e-6 else ""


def tens(value: float) -> str:
    return f"{100 * value:.0f}{NARROW}%"


def where(item: Record) -> str:
    return "dense model" if item.method == "dense" else f"{item.label}, N_B = {item.depth}"


def depth_range(records: Sequence[Record]) -> tuple[float, float]:
    most = max((item.depth or 0 for item in records), default=1)
    return (-0.03 * max(most, 1), 1.03 * max(most, 1))


def draw_boundaries(panel: Panel, boundaries: Sequence[Boundary], named: bool = True) -> None:
    """The interval as a shaded band, the boundary as a dashed line (behind the data)."""
    known = [item for item in boundaries if item.value is not None]
    for item in known:
        if item.low is not None:
            panel.band(item.low, panel.x.high if item.high is None else item.high, "interval")
    for item in known:
        label = f"boundary N_B = {short(item.value)}" if named else ""
        if len(known) > 1 and item.num_branches is not None:
            label = label and f"N_B = {short(item.value)} ({item.num_branches} br.)"
        panel.vertical(item.value or 0.0, label, "boundary")


def _points(
    group: Sequence[Record], value: Callable[[Record], float | None], say: Callable[[Record], str]
) -> list[Point]:
    found = []
    for item in group:
        y = value(item)
        if y is not None:
            interval = (item.low, item.high) if y is item.accuracy else (None, None)
            found.append(Point(item.depth or 0, y, f"{where(item)}: {say(item)}", *interval))
    return found


def accuracy_words(item: Record) -> str:
    words = f"accuracy {percent(item.accuracy)}"
    if item.low is not None and item.high is not None:
        words += f" [{percent(item.low)}, {percent(item.high)}]"
    return words


def _add_series(
    panel: Panel,
    dense: Record,
    records: Sequence[Record],
    styles: dict[Key, Style],
    value: Callable[[Record], float | None],
    say: Callable[[Record], str],
) -> None:
    """Null baselines first, so that MixT lies on top; each line starts at the dense model where that was measured."""
    groups = by_series(records)
    for key in sorted(groups, key=lambda key: (key[0] == "mixt", key[1] == "last")):
        points = _points(groups[key], value, say)
        start = _points([dense], value, say)
        if points and start:
            panel.line([(start[0].x, start[0].y), (points[0].x, points[0].y)], styles[key])
        panel.series(points, styles[key])
    panel.points(_points([dense], value, say), DENSE)


def _accuracy_panel(
    title: str, dense: Record, records: Sequence[Record], marks: Sequence[Boundary], styles: dict[Key, Style]
) -> str:
    ends = [v for item in [dense, *records] for v in (item.accuracy, item.low, item.high) if v is not None]
    low, high = padded([*ends, CHANCE])
    panel = Panel(
        depth_range(records),
        (max(low - 0.03, -0.02), min(high + 0.02, 1.02)),
        title=title,
        x_label=DEPTH,
        x_format=whole,
        y_format=tens,
        description=f"{title}: exam accuracy against number of blocks replaced; values are in the table below",
    )
    draw_boundaries(panel, marks)
    panel.horizontal(CHANCE, f"chance {tens(CHANCE)}", "level", at_end=False, below=True)
    if dense.accuracy is not None:
        panel.horizontal(dense.accuracy, f"dense {percent(dense.accuracy)}", "level", at_end=True)
    _add_series(panel, dense, records, styles, lambda item: item.accuracy, accuracy_words)
    return panel.svg()


def _entropy_panel(
    name: str,
    key: str,
    dense: Record,
    records: Sequence[Record],
    marks: Sequence[Boundary],
    styles: dict[Key, Style],
) -> str | None:
    values = [getattr(item, key) for item in [dense, *records] if getattr(item, key) is not None]
    if not values:
        return None
    low, high = padded(values)
    panel = Panel(
        depth_range(records),
        (max(low, -0.03), min(high, 1.03)),
        title=name,
        x_label=DEPTH,
        x_format=whole,
        description=f"{name} against number of blocks replaced; values are in the table below",
    )
    draw_boundaries(panel, marks)
    _add_series(
        panel,
        dense,
        records,
        styles,
        lambda item: getattr(item, key),
        lambda item: f"{name} {fixed(getattr(item, key))}",
    )
    return panel.svg()


def main_boundaries(boundaries: Sequence[Boundary]) -> list[Boundary]:
    """What is marked in the figures: the boundaries of MixT, back to front."""
    return [item for item in boundaries if item.method == "mixt" and item.direction == "last"]


def accuracy_figure(dense: Record, records: list[Record], boundaries: list[Boundary]) -> Figure | None:
    """Accuracy and both entropies against N_B (Fig. 2 and 3a of the paper, with null baselines)."""
    if not any(item.accuracy is not None for item in records):
        return None
    styles, marks = looks(records), main_boundaries(boundaries)
    back = [item for item in records if item.direction == "last"]
    front = [item for item in records if item.direction != "last"]
    panels = [_accuracy_panel("Exam accuracy, back to front", dense, back or records, marks if back else [], styles)]
    if front and back:
        both = [item for item in records if item.method == "mixt" or item.direction != "last"]
        panels.append(_accuracy_panel("Exam accuracy, by direction", dense, both, marks, styles))
    for name, key in (("Output entropy (OE)", "output_entropy"), ("Prediction entropy (PE)", "prediction_entropy")):
        drawn = _entropy_panel(name, key, dense, back or records, marks, styles)
        panels += [drawn] if drawn else []
    columns = [
        "series",
        "direction",
        "method",
        "num_branches",
        "N_B",
        "accuracy",
        "low",
        "high",
        "num_questions",
        "OE",
        "PE",
    ]
    rows = [
        [
            item.method if item is dense else item.label,
            item.direction,
            item.method,
            item.num_branches,
            item.depth,
            item.accuracy,
            item.low,
            item.high,
            item.num_questions,
            item.output_entropy,
            item.prediction_entropy,
        ]
        for item in [dense, *records]
        if item is not dense or dense.accuracy is not None
    ]
    legend = [(DENSE, "dense model")] if dense.accuracy is not None else []
    legend += [(style, next(r.label for r in records if r.series == key)) for key, style in styles.items()]
    return Figure(
        "accuracy",
        "Accuracy and answer entropies as blocks are replaced",
        panels,
        _accuracy_text(marks),
        columns,
        rows,
        legend,
    )


def _accuracy_text(marks: Sequence[Boundary]) -> str:
    known = [item for item in marks if item.value is not None]
    boundary = (
        "The dashed line marks the <strong>boundary</strong>, the first depth at which accuracy has left its plateau "
        "and does not come back; the shaded band is its confidence interval. "
        if known
        else "No boundary is marked: none has been found (or computed yet) for this sweep. "
    )
    return (
        f"<p><strong>{SYMBOL}</strong> is the number of transformer blocks in which every linear layer is replaced, "
        f"counted from the output side (“back to front”) unless the legend says “front to back”. {boundary}Vertical "
        "bars are 95&nbsp;% intervals of accuracy. The null baselines cost nothing to build: <em>zeroed linears</em> "
        "outputs zero where MixT has an operator, <em>dropped blocks</em> removes the blocks. MixT earns its "
        "parameters only where it lies above both.</p><p><strong>Output entropy (OE)</strong> says how undecided the "
        "model is on one question: the entropy of its probabilities for the four answers, averaged over questions; 0 "
        "is certain, 1 is a four-way tie. <strong>Prediction entropy (PE)</strong> says how evenly it uses the four "
        "letters over the whole exam; 1 is even, 0 means that it always gives the same letter. Past the boundary OE "
        "rises, and PE often falls.</p>"
    )


def perplexity_figure(dense: Record, records: list[Record], boundaries: list[Boundary]) -> Figure | None:
    """Perplexity against N_B, one drawing per text, logarithmic."""
    names = list(dict.fromkeys(name for item in [dense, *records] for name in item.perplexity))
    if not names or not records:
        return None
    styles, panels, rows = looks(records), [], []
    for name in names:
        measured = [item for item in [dense, *records] if item.perplexity.get(name, 0) > 0]
        if not measured:
            continue
        panel = Panel(
            depth_range(records),
            padded([item.perplexity[name] for item in measured], log=True),
            title=f"Perplexity: {name}",
            x_label=DEPTH,
            x_format=whole,
            log_y=True,
            description=f"Perplexity of {name} against number of blocks replaced; values are in the table below",
        )
        draw_boundaries(panel, main_boundaries(boundaries))
        if name in dense.perplexity:
            panel.horizontal(dense.perplexity[name], f"dense {short(dense.perplexity[name])}", "level", at_end=True)
        _add_series(
            panel, dense, records, styles,
            lambda item, name=name: item.perplexity.get(name),
            lambda item, name=name: f"perplexity {short(item.perplexity[name])}",
        )  # fmt: skip
        panels.append(panel.svg())
        rows += [
            [
                "dense" if i is dense else i.label,
                i.direction,
                i.method,
                i.num_branches,
                i.depth,
                name,
                i.perplexity[name],
            ]
            for i in measured
        ]
    if not panels:
        return None
    legend = [(DENSE, "dense model")] + [
        (style, next(r.label for r in records if r.series == key)) for key, style in styles.items()
    ]
    explanation = (
        "<p><strong>Perplexity</strong> is how many tokens the model hesitates between, on average, when it predicts "
        "the next token of a text; lower is better. The axis is logarithmic: equal steps are equal factors. "
        f"{plural(len(panels), 'text').capitalize()}, one drawing each; the thin line is the dense model. Hollow "
        "markers are front to back.</p>"
    )
    columns = ["series", "direction", "method", "num_branches", "N_B", "text", "perplexity"]
    return Figure("perplexity", "Perplexity as blocks are replaced", panels, explanation, columns, rows, legend)
