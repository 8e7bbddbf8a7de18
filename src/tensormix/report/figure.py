"""A figure of the page: drawings, legend, explanation, and the rows behind it as CSV and as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from .measures import Record
from .numbers import MISSING, short, text
from .svg import Style, swatch

Key = tuple[str, str, int | None]
MIXT_LOOKS = (("c-blue", "circle"), ("c-green", "diamond"), ("c-sky", "down"), ("c-yellow", "plus"))
OTHER_LOOKS = {
    "zero": ("c-orange", "square"),
    "drop_blocks": ("c-purple", "triangle"),
    "mean_output": ("c-ink", "cross"),
    "svd": ("c-green", "star"),
}
DENSE = Style("c-ink", "star")
ROLE_LOOKS = (
    Style("c-blue", "circle"),
    Style("c-sky", "down"),
    Style("c-green", "diamond"),
    Style("c-purple", "triangle"),
    Style("c-orange", "square"),
    Style("c-red", "star"),
    Style("c-ink", "plus"),
    Style("c-yellow", "cross"),
)


@dataclass(frozen=True)
class Figure:
    """One figure; `rows` has one row per drawn value, in the words of `columns`."""

    key: str
    title: str
    panels: list[str]
    explanation: str  # HTML
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    legend: list[tuple[Style, str]] = field(default_factory=list)
    extra: str = ""  # HTML after the legend, for example a colour scale


def looks(records: Iterable[Record]) -> dict[Key, Style]:
    """Colour by method and branches, shape likewise, hollow and dashed for front to back."""
    keys = list(dict.fromkeys(item.series for item in records))
    mixts = sorted({key[2] or 0 for key in keys if key[0] == "mixt"}, key=lambda n: (n != 4, n))
    styles = {}
    for key in keys:
        if key[0] == "mixt":
            colour, shape = MIXT_LOOKS[mixts.index(key[2] or 0) % len(MIXT_LOOKS)]
        else:
            colour, shape = OTHER_LOOKS.get(key[0], ("c-red", "cross"))
        styles[key] = Style(colour, shape, hollow=key[1] != "last")
    return styles


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values; a missing value is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return out.getvalue()


def download(name: str, content: str, label: str, kind: str = "text/csv") -> str:
    """A link that holds its file itself."""
    uri = f"data:{kind};charset=utf-8,{quote(content)}"
    return f'<a class="download" download="{text(name)}" href="{text(uri)}">{label}</a>'


def shown(value: Any) -> str:
    if value is None:
        return MISSING
    return text(short(value)) if isinstance(value, float) else text(value)


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> str:
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{shown(value)}</td>" for value in row) + "</tr>" for row in rows)
    return scroll(
        f'<table class="data"><caption class="hidden">{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        caption,
    )


def scroll(table: str, name: str) -> str:
    """A table that scrolls sideways by itself on a narrow page, also from the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(name)}">{table}</div>'


def render(figure: Figure, index: int, published: str = "") -> str:
    """HTML of one figure; `published` names the figures of the papers that show the same."""
    legend = "".join(f"<li>{swatch(style)}<span>{text(name)}</span></li>" for style, name in figure.legend)
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    shape = "single" if len(figure.panels) == 1 else "odd" if len(figure.panels) % 2 else "even"
    name = f"Figure {index}. {figure.title}"
    data = plain_table(figure.columns, figure.rows, f"Data behind figure {index}")
    beside = f'<p class="small">As {text(published)}, measured on these runs.</p>' if published else ""
    link = download(f"{figure.key}.csv", csv_text(figure.columns, figure.rows), "CSV")
    return (
        f'<figure id="{text(figure.key)}" class="{shape}">'
        f"<h3>{text(name)}</h3>{legend}{figure.extra}"
        f'<div class="panels">{"".join(figure.panels)}</div>'
        f"<figcaption>{figure.explanation}{beside}</figcaption>"
        f"<details><summary>Data behind this figure ({len(figure.rows)} rows)</summary>"
        f'<p class="small">Download as {link}</p>{data}</details></figure>'
    )
