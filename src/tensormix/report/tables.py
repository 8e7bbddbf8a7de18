"""Tables of the page: cells, resources, boundaries, sites, settings, environments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .figure import csv_text, download, scroll
from .measures import Boundary, Record, last_on_plateau
from .numbers import (
    DIRECTIONS,
    METHODS,
    MISSING,
    bytes_text,
    change,
    count,
    fixed,
    milliseconds,
    nb,
    number,
    percent,
    plural,
    seconds_text,
    short,
    text,
)
from .read import STAGES, Cell, Row, Run

Column = tuple[str, str]  # heading, class of its cells
Line = tuple[str, Sequence[str]]  # class, cells as HTML


def table(name: str, columns: Sequence[Column], rows: Iterable[Line], caption: str = "") -> str:
    """Rows are (class, cells as HTML); the first cell is the row's heading; a row of class "group" has only that."""
    head = "".join(f'<th scope="col" class="{cls}">{title}</th>' for title, cls in columns)
    body = []
    for row_class, cells in rows:
        first, *rest = cells
        if row_class == "group":  # one cell that names the rows below it
            body.append(
                f'<tr class="group"><th colspan="{len(columns)}" scope="colgroup"><span>{first}</span></th></tr>'
            )
            continue
        tds = "".join(f'<td class="{cls}">{cell}</td>' for cell, (_, cls) in zip(rest, columns[1:], strict=True))
        body.append(f'<tr class="{row_class}"><th scope="row">{first}</th>{tds}</tr>')
    note = f"<caption>{caption}</caption>" if caption else f'<caption class="hidden">{text(name)}</caption>'
    return scroll(f"<table>{note}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>", name)


def with_change(value: str, delta: str) -> str:
    return value if delta == MISSING else f'{value}<span class="delta">{delta}</span>'


def interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return percent(value)
    return f'{percent(value)}<span class="delta">{100 * low:.1f} to {100 * high:.1f}</span>'


def place(item: Record) -> str:
    return "dense" if item.method == "dense" else str(item.depth)


def grouped(
    items: Sequence[Record], cells: Callable[[Record], list[str]], marked: Callable[[Record], bool]
) -> list[Line]:
    """Lines of a table in which every series has a line with its name above it."""
    lines: list[Line] = []
    before = None
    for item in items:
        if item.series != before and item.method != "dense":
            lines.append(("group", [text(item.label)]))
        before = item.series
        lines.append(("marked" if marked(item) else "", [place(item), *cells(item)]))
    return lines


def marks_of(item: Record, boundaries: Sequence[Boundary], records: Sequence[Record]) -> list[str]:
    """In words: is this checkpoint the last on the plateau, or the first past its boundary?"""
    found = []
    for boundary in boundaries:
        if boundary.series != item.series or boundary.value is None or item.depth is None:
            continue
        if item is last_on_plateau(list(records), boundary):
            found.append("last on the plateau")
        past = [r.depth for r in records if r.series == item.series and (r.depth or 0) >= boundary.value]
        if past and item.depth == min(past, key=lambda depth: depth or 0):
            found.append("boundary")
    return found


def cells_table(dense: Record, records: Sequence[Record], boundaries: Sequence[Boundary]) -> str:
    """Every finished cell with what was measured on it; groups are separated, null baselines stand beside MixT."""
    texts = list(dict.fromkeys(name for item in [dense, *records] for name in item.perplexity))
    columns = [(nb("N_B"), ""), ("Accuracy<br><small>95&nbsp;% interval</small>", "n"), ("OE", "n"), ("PE", "n")]
    columns += [(f"Perplexity<br><small>{text(name)}</small>", "n") for name in texts]
    columns += [("Drift<br><small>all pairs</small>", "n"), ("Drift<br><small>output</small>", "n"), ("Mark", "")]

    def cells(item: Record) -> list[str]:
        found = [
            interval(item.accuracy, item.low, item.high),
            fixed(item.output_entropy),
            fixed(item.prediction_entropy),
        ]
        found += [short(item.perplexity.get(name)) for name in texts]
        found += [fixed(item.drift.get("all"), 4), fixed(item.drift.get("output"), 4)]
        return [*found, ", ".join(marks_of(item, boundaries, records))]

    lines = grouped([dense, *records], cells, lambda item: bool(marks_of(item, boundaries, records)))
    link = _cells_csv(dense, records, boundaries, texts)
    return table("All cells", columns, lines) + f'<p class="small">Download as {link}</p>'


def _cells_csv(dense: Record, records: Sequence[Record], boundaries: Sequence[Boundary], texts: Sequence[str]) -> str:
    columns = [
        "cell",
        "method",
        "direction",
        "num_branches",
        "N_B",
        "accuracy",
        "low",
        "high",
        "num_questions",
        "OE",
        "PE",
    ]
    columns += [*(f"perplexity {name}" for name in texts), "drift_all", "drift_output", "mark"]
    rows = [
        [
            i.name,
            i.method,
            i.direction,
            i.num_branches,
            i.depth,
            i.accuracy,
            i.low,
            i.high,
            i.num_questions,
            i.output_entropy,
            i.prediction_entropy,
            *(i.perplexity.get(name) for name in texts),
            i.drift.get("all"),
            i.drift.get("output"),
            "; ".join(marks_of(i, boundaries, records)),
        ]
        for i in [dense, *records]
    ]
    return download("cells.csv", csv_text(columns, rows), "CSV")


def dtypes_of(records: Iterable[Record]) -> list[str]:
    found: dict[str, None] = {}
    for item in records:
        given = item.resources.get("bytes")
        found.update(dict.fromkeys(given if isinstance(given, dict) else {}))
    return list(found)


def latency_cell(item: Record, tokens: int) -> str:
    row = item.latency.get(tokens, {})
    value = milliseconds(number(row.get("median_ms")))
    ratio = item.speedup(tokens)
    if item.method == "dense" or ratio is None:
        return value
    slower = ratio < 0.985
    said = f"{ratio:.2f}×" + (", slower" if slower else ", faster" if ratio > 1.015 else "")
    return f'{value}<span class="delta{" bad" if slower else ""}">{said}</span>'


def resources_table(dense: Record, records: Sequence[Record], boundaries: Sequence[Boundary] = ()) -> str:
    """Parameters, arithmetic, bytes, memory and time of every profiled cell, the dense model first."""
    items = [item for item in [dense, *records] if item.resources or item.latency]
    if not items:
        return '<p class="none">No cell has been profiled yet.</p>'
    types, lengths = dtypes_of(items), sorted({tokens for item in items for tokens in item.latency})
    columns = [(nb("N_B"), ""), ("Parameters", "n"), ("MACs<br><small>per token</small>", "n"), ("On disk", "n")]
    columns += [(f"Weights<br><small>{text(name)}</small>", "n") for name in types]
    columns += [
        ("Peak memory", "n"),
        *((f"Latency<br><small>{plural(tokens, 'token')}</small>", "n") for tokens in lengths),
    ]

    def cells(item: Record) -> list[str]:
        shows = (("parameters", count), ("macs_per_token", count), ("bytes_on_disk", bytes_text))
        found = [_beside(item, dense, item.resource(key), dense.resource(key), show) for key, show in shows]
        found += [_beside(item, dense, _of_type(item, name), _of_type(dense, name), bytes_text) for name in types]
        peak = "peak_memory_bytes"
        found.append(_beside(item, dense, item.resource(peak), dense.resource(peak), bytes_text))
        return found + [latency_cell(item, tokens) for tokens in lengths]

    return table("Resources", columns, grouped(items, cells, lambda item: bool(marks_of(item, boundaries, records))))


def _of_type(item: Record, dtype: str) -> float | None:
    given = item.resources.get("bytes")
    return number(given.get(dtype)) if isinstance(given, dict) else None


def _beside(item: Record, dense: Record, value: float | None, reference: float | None, show: Any) -> str:
    return show(value) if item is dense else with_change(show(value), change(value, reference))


def boundaries_table(boundaries: Sequence[Boundary], records: Sequence[Record]) -> str:
    """Every boundary that the sweep has written, the null baselines' too."""
    if not boundaries:
        return ""
    columns = [
        ("Series", ""),
        ("Boundary " + nb("N_B"), "n"),
        ("Interval", "n"),
        ("Last on the plateau", "n"),
        ("Accuracy there", "n"),
    ]
    rows = []
    for item in boundaries:
        last = last_on_plateau(list(records), item)
        span = item.interval or MISSING
        value = "not reached" if item.value is None else short(item.value)
        cells = [text(item.label), value, span, MISSING if last is None else nb(f"N_B = {last.depth}")]
        rows.append(("", [*cells, MISSING if last is None else interval(last.accuracy, last.low, last.high)]))
    return table("Boundaries", columns, rows)


def unfinished_table(cells: Sequence[Cell]) -> str:
    """Cells without an evaluation, with what they have."""
    columns = [("Cell", ""), (nb("N_B"), "n"), ("Method", ""), ("Direction", ""), ("State", ""), ("Stages done", "")]
    rows = []
    for cell in cells:
        done = [stage for stage in STAGES if cell.run is not None and stage in cell.run.stages]
        method, direction = METHODS.get(cell.method, cell.method), DIRECTIONS.get(cell.direction, cell.direction)
        state = "not started" if cell.run is None else "not finished"
        rows.append(
            ("", [text(cell.name), str(cell.depth), text(method), text(direction), state, ", ".join(done) or "none"])
        )
    return table("Cells that are not finished", columns, rows)


def sites_table(run: Run) -> str:
    """Every replaced site of one run."""
    found = run.rows("compress")
    if not found:
        return '<p class="none">The compress stage has not finished or replaced nothing.</p>'
    columns = [("Site", ""), ("Method", ""), ("Operator", ""), ("Parameters", "n"), ("MACs per token", "n")]
    columns += [("Relative error", "n"), ("Time", "n")]
    rows = [
        (
            "",
            [
                f"<code>{text(row.get('site'))}</code>",
                text(row.get("method", MISSING)),
                text(row.get("operator", MISSING)),
                _pair(row, "parameters"),
                _pair(row, "macs_per_token"),
                percent(number(row.get("relative_error"))),
                seconds_text(number(row.get("seconds"))),
            ],
        )
        for row in found
    ]
    return table("Sites", columns, rows)


def _pair(row: Row, key: str) -> str:
    own, dense = number(row.get(key)), number(row.get(f"dense_{key}"))
    return with_change(count(own), change(own, dense))


def subjects_table(item: Record, dense: Record) -> str:
    """Accuracy by subject, the dense model beside it."""
    if not item.subjects:
        return ""
    columns = [("Subject", ""), ("Questions", "n"), ("Accuracy", "n"), ("Dense", "n")]
    rows = []
    for name, row in item.subjects.items():
        cells = [
            text(name),
            short(number(row.get("num_questions"))),
            _accuracy(row),
            _accuracy(dense.subjects.get(name, {})),
        ]
        rows.append(("", cells))
    return table("Accuracy by subject", columns, rows)


def _accuracy(row: Row) -> str:
    return interval(number(row.get("value")), number(row.get("low")), number(row.get("high")))
