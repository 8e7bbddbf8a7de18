"""What a section of the page holds: figures and tables, with their rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from .chart import Chart, Entry
from .numbers import MISSING, short
from .rendering import render, say

Columns = Mapping[
    str, str | Callable[[Any], Any]
]  # name -> attribute of the item (key of a row), or what gives the value


@dataclass(frozen=True)
class Data:
    """The values behind a figure or table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def csv(self) -> str:
        """Comma-separated values; a missing value is an empty field."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        return out.getvalue()

    @property
    def shown(self) -> list[list[Any]]:
        return [[MISSING if v is None else short(v) if isinstance(v, float) else v for v in row] for row in self.rows]


def data(items: Iterable[Any], columns: Columns | Sequence[str]) -> Data:
    """One row per item; columns without a function are read by their own name."""
    columns = columns if isinstance(columns, Mapping) else {name: name for name in columns}

    def value(item: Any, take: str | Callable[[Any], Any]) -> Any:
        if callable(take):
            return take(item)
        return item[take] if isinstance(item, dict) else getattr(item, take)

    return Data(list(columns), [[value(item, take) for take in columns.values()] for item in items])


class ColourScale(NamedTuple):
    """What the colours of a figure mean: from `low` to `high`."""

    low: str
    colours: Sequence[str]
    high: str


@dataclass(frozen=True)
class Figure:
    """One figure; `data` has one row per drawn value."""

    key: str
    title: str
    charts: Sequence[Chart]
    caption: Markup
    data: Data
    scale: ColourScale | None = None

    @property
    def legend(self) -> list[Entry]:
        """Each name once, in the order of the charts."""
        found: dict[str, Entry] = {}
        for entry in (entry for chart in self.charts for entry in chart.legend):
            found.setdefault(entry.name, entry)
        return list(found.values())

    def html(self, number: int, published: str = "") -> Markup:
        """`published` names the figures of the papers that show the same."""
        shape = "single" if len(self.charts) == 1 else "odd" if len(self.charts) % 2 else "even"
        return render("figure", figure=self, number=number, shape=shape, published=published)


def figure(
    key: str,
    title: str,
    charts: Sequence[Chart],
    data: Data,
    scale: ColourScale | None = None,
    caption: str = "",
    **facts: Any,
) -> Figure | None:
    """A figure with the macro `caption` of captions.html, or that of its key; None without a drawing."""
    if not charts:
        return None
    return Figure(key, title, charts, say("captions", caption or key.replace("-", "_"), **facts), data, scale)


class Shown(NamedTuple):
    """A cell of a table with a second line below its value."""

    value: str
    below: str
    bad: bool = False


class Column(NamedTuple):
    """One column of a table: its head with a small second line, and what stands in it."""

    head: str
    cell: Callable[[Any], Any]
    small: str = ""
    numeric: bool = True


class Line(NamedTuple):
    cells: list[Any]
    marked: bool = False
    group: str = ""  # a line with this name comes before


@dataclass(frozen=True)
class Table:
    """A table for the eye, and the same as a file."""

    name: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    caption: str = ""
    key: str = ""  # id on the page
    file: str = ""
    data: Data | None = None

    def __html__(self) -> str:
        return render("table", table=self)


def table(
    name: str,
    columns: Sequence[Column],
    items: Iterable[Any],
    marked: Callable[[Any], bool] = lambda item: False,
    group: Callable[[Any], str] = lambda item: "",
    first: Sequence[Any] = (),
    **more: Any,
) -> Table:
    """One line per item, of which the first cell is the heading; where `group` changes, its name stands above.

    `first` are the cells of a line before all others.
    """
    lines, before = [Line(list(first))] if first else [], ""
    for item in items:
        own = group(item)
        lines.append(Line([column.cell(item) for column in columns], marked(item), own if own != before else ""))
        before = own
    return Table(name, columns, lines, **more)
