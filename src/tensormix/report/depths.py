"""Figures of a sweep against depth: accuracy and answer entropies, perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from .boundary import Boundary, main_boundaries
from .chart import Chart, chart
from .figure import Figure, data, figure
from .measures import CHANCE, Record
from .numbers import fixed, percent, short, whole_percent
from .parts import Level
from .scales import Axis
from .series import DEPTH, Styles, accuracy_words, boundary_marks, point, series_of, styles_of

PLACE = {name: name for name in ("direction", "method", "num_branches")}
PLACE = {"series": "label", **PLACE, "N_B": "depth"}
ENTROPIES = (("output_entropy", "Output entropy (OE)"), ("prediction_entropy", "Prediction entropy (PE)"))


def _accuracy(title: str, dense: Record, records: Sequence[Record], marks: Sequence[Boundary], styles: Styles) -> Chart:
    found = series_of(
        dense, records, styles, lambda item: point(item, item.depth, item.accuracy, accuracy_words(item), interval=True)
    )
    levels = [Level(CHANCE, f"chance {whole_percent(CHANCE)}", at_end=False, below=True)]
    levels += [Level(dense.accuracy, f"dense {percent(dense.accuracy)}")] if dense.accuracy is not None else []
    share = Axis(format=whole_percent, room=0.1, limits=(-0.02, 1.02))
    return chart(title, DEPTH, share, [*found, *levels, *boundary_marks(marks)])


def accuracy_figure(dense: Record, records: list[Record], boundaries: list[Boundary]) -> Figure | None:
    """Accuracy and both entropies against N_B (Fig. 2 and 3a of the paper, with null baselines)."""
    if not any(item.accuracy is not None for item in records):
        return None
    styles, marks = styles_of(records), main_boundaries(boundaries)
    back = [item for item in records if item.direction == "last"]
    front = [item for item in records if item.direction != "last"]
    title = "Exam accuracy, back to front" if back else "Accuracy"
    charts = [_accuracy(title, dense, back or records, marks if back else [], styles)]
    if front and back:
        both = [item for item in records if item.method == "mixt" or item.direction != "last"]
        charts.append(_accuracy("Exam accuracy, by direction", dense, both, marks, styles))
    for key, name in ENTROPIES:
        found = series_of(
            dense, back or records, styles,
            lambda i, key=key, name=name: point(i, i.depth, getattr(i, key), f"{name} {fixed(getattr(i, key))}"),
        )  # fmt: skip
        if found:
            charts.append(chart(name, DEPTH, Axis(limits=(-0.03, 1.03)), [*found, *boundary_marks(marks)]))
    columns = {**PLACE, "accuracy": "accuracy", "low": "low", "high": "high", "num_questions": "num_questions"}
    columns |= {"OE": "output_entropy", "PE": "prediction_entropy"}
    items = [dense, *records] if dense.accuracy is not None else records
    title = "Accuracy and answer entropies as blocks are replaced"
    known = any(mark.value is not None for mark in marks)
    return figure("accuracy", title, charts, data(items, columns), found=known)


def perplexity_figure(dense: Record, records: list[Record], boundaries: list[Boundary]) -> Figure | None:
    """Perplexity against N_B, one drawing per text, logarithmic."""
    styles, charts, measured = styles_of(records), [], []
    for name in dict.fromkeys(name for item in [dense, *records] for name in item.perplexity) if records else ():

        def value(item: Record, name: str = name) -> float | None:
            found = item.perplexity.get(name, 0.0)
            return found if found > 0 else None

        items = [item for item in [dense, *records] if value(item) is not None]
        found = series_of(
            dense, records, styles, lambda i, value=value: point(i, i.depth, value(i), f"perplexity {short(value(i))}")
        )
        if found:
            levels = [Level(y, f"dense {short(y)}")] if (y := value(dense)) is not None else []
            parts = [*found, *levels, *boundary_marks(main_boundaries(boundaries))]
            charts.append(chart(f"Perplexity: {name}", DEPTH, Axis(log=True), parts))
            measured += [(item, name) for item in items]
    columns = {key: lambda pair, take=take: getattr(pair[0], take) for key, take in PLACE.items()}
    columns |= {"text": lambda pair: pair[1], "perplexity": lambda pair: pair[0].perplexity[pair[1]]}
    title = "Perplexity as blocks are replaced"
    return figure("perplexity", title, charts, data(measured, columns), num_texts=len(charts))
