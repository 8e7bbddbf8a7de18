"""A drawing: `chart` takes two axes and what lies between them, and gives SVG and the entries of its legend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from .parts import COLOUR_BAR, Cells, Frame, Line, Part, Series
from .scales import Axis, Scale, Steps
from .svg import BOTTOM, HEIGHT, LEFT, RIGHT, SHAPES, TOP, WIDTH, Style, element, pixels, words


class Entry(NamedTuple):
    """A line of a legend."""

    name: str
    style: Style
    line: bool
    marks: bool

    @property
    def swatch(self) -> Markup:
        line = element("path", cls=f"line {self.style.classes}", d="M1,7H29")
        mark = element("path", cls=f"mark {self.style.classes}", transform="translate(15,7)",
                       d=SHAPES[self.style.shape](4.5))  # fmt: skip
        inner = Markup("").join([line] * self.line + [mark] * self.marks)
        return element("svg", inner, cls="swatch", viewBox="0 0 30 14", aria_hidden="true")


class Chart(NamedTuple):
    svg: Markup
    legend: list[Entry]


def chart(title: str, x: Axis, y: Axis, parts: Sequence[Part]) -> Chart:
    """A drawing of all parts; its legend names those that have a name, in their order."""
    xs, ys = ([value for value in values if value is not None]
              for values in zip(*(place for part in parts for place in part.places()), strict=True))  # fmt: skip
    stop, base = WIDTH - RIGHT, HEIGHT - BOTTOM
    if any(isinstance(part, Cells) for part in parts):
        columns, lines = Steps(sorted(set(xs)), LEFT, WIDTH - COLOUR_BAR, 12), Steps(sorted(set(ys)), base, TOP, 9)
        frame = Frame(columns, lines)
    else:
        frame = Frame(x.scale(xs, LEFT, stop), y.scale(ys, base, TOP))
    drawn = [*_axes(frame, x, y)]
    for part in sorted(reversed(parts), key=lambda part: part.layer):
        drawn += part.draw(frame)
    about = f"{title} against {x.label}; the values are in the table below"
    inner = Markup("").join([words(4, 16, title, "panel-name"), *drawn])
    svg = element("svg", inner, cls="panel", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", tabindex="0",
                  aria_label=about)  # fmt: skip
    named = [part for part in parts if isinstance(part, Series | Line) and part.name]
    return Chart(svg, [Entry(part.name, part.style, part.line, part.marks) for part in named])


def _axes(frame: Frame, x: Axis, y: Axis) -> Iterator[Markup]:
    base, stop = frame.y.start, frame.x.stop
    for value in frame.y.ticks():
        at = frame.y(value)
        if isinstance(frame.y, Scale):
            yield element("path", cls="grid", d=f"M{LEFT},{pixels(at)}H{pixels(stop)}")
        yield words(LEFT - 7, at + 4, y.format(value), "tick", "end")
    for value in frame.x.ticks():
        at = frame.x(value)
        if isinstance(frame.x, Scale):
            yield element("path", cls="axis", d=f"M{pixels(at)},{base}v5")
        yield words(at, base + 18, x.format(value), "tick", "middle")
    if isinstance(frame.x, Scale):
        yield element("path", cls="axis", d=f"M{LEFT},{base}H{pixels(stop)}")
    yield words((LEFT + stop) / 2, HEIGHT - 8, x.label, "axis-name", "middle")
