"""What can lie in a chart: series, lines, arrows, areas, levels, marked positions, heat cells.

Every point carries its values twice: as `data-x`, `data-y` (as given) and as a `<title>` sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from markupsafe import Markup

from .numbers import short
from .scales import Steps, ramp
from .svg import LEFT, SHAPES, TOP, WIDTH, Style, element, pixels, words

COLOUR_BAR = 58  # width kept for it beside heat cells
HEAD = 7.0  # pixels of an arrow's head
Place = tuple[float | None, float | None]


class Frame(NamedTuple):
    """The two scales of a drawing."""

    x: Any  # Scale or Steps, as y
    y: Any

    def at(self, x: float, y: float) -> str:
        return f"{pixels(self.x(x))},{pixels(self.y(y))}"


class Part(Protocol):
    """Something drawn in a chart. Lower layers are drawn first; of one layer what is given first lies on top."""

    layer: int

    def places(self) -> Iterator[Place]: ...

    def draw(self, frame: Frame) -> Iterator[Markup]: ...


class Point(NamedTuple):
    """A measured value; `low`, `high` its interval; `tip` the sentence shown on hover."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None
    size: float = 4.2
    colour: str = ""  # a fixed one instead of the style's


@dataclass(frozen=True)
class Series:
    """Markers with their intervals and, if asked, a line through them that begins at `start`."""

    points: Sequence[Point]
    style: Style
    name: str = ""  # in the legend
    line: bool = False
    start: tuple[float, float] | None = None
    marks = True
    layer = 4

    def places(self) -> Iterator[Place]:
        for point in self.points:
            yield from ((point.x, y) for y in (point.y, point.low, point.high) if y is not None)

    def draw(self, frame: Frame) -> Iterator[Markup]:
        corners = [(point.x, point.y) for point in self.points]
        if self.line and corners:
            yield from Line([self.start, *corners] if self.start else corners, self.style).draw(frame)
        for point in self.points:
            x, y = pixels(frame.x(point.x)), pixels(frame.y(point.y))
            if point.low is not None and point.high is not None:
                low, high = (pixels(frame.y(_inside(end, frame.y))) for end in (point.low, point.high))
                yield element("path", cls=f"bar {self.style.classes}", d=f"M{x},{low}V{high}")
            yield element(
                "path", element("title", point.tip), cls=f"mark {self.style.classes}", data_x=f"{point.x:.10g}",
                data_y=f"{point.y:.10g}", transform=f"translate({x},{y})", d=SHAPES[self.style.shape](point.size),
                style=point.colour and f"fill:{point.colour}",
            )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line through (x, y); it widens the axes only if it `counts`."""

    corners: Sequence[tuple[float, float]]
    style: Style
    name: str = ""
    colour: str = ""  # a fixed one instead of the style's
    counts: bool = False
    line, marks = True, False
    layer = 3

    def places(self) -> Iterator[Place]:
        yield from self.corners if self.counts else ()

    def draw(self, frame: Frame) -> Iterator[Markup]:
        if len(self.corners) > 1:
            way = "L".join(frame.at(x, y) for x, y in self.corners)
            yield element("path", cls=f"line {self.style.classes}", d=f"M{way}",
                          style=self.colour and f"stroke:{self.colour}")  # fmt: skip


@dataclass(frozen=True)
class Arrow:
    """From one value to another; the head ends `gap` pixels before the mark there. Too short a way is not drawn."""

    begin: tuple[float, float]
    end: tuple[float, float]
    style: Style
    gap: float = 6.5
    layer = 3

    def places(self) -> Iterator[Place]:
        yield from (self.begin, self.end)

    def draw(self, frame: Frame) -> Iterator[Markup]:
        start, stop = (complex(frame.x(x), frame.y(y)) for x, y in (self.begin, self.end))
        if abs(stop - start) < self.gap + HEAD:
            return
        along = (stop - start) / abs(stop - start)

        def at(back: float, side: float = 0.0) -> str:
            """A point `back` pixels before the end and `side` pixels beside the line."""
            place = stop + along * complex(-back, side)
            return f"{pixels(place.real)},{pixels(place.imag)}"

        head = f"M{at(self.gap + HEAD, HEAD / 2)}L{at(self.gap)}L{at(self.gap + HEAD, -HEAD / 2)}"
        way = f"M{pixels(start.real)},{pixels(start.imag)}L{at(self.gap)}"
        yield element("path", cls=f"arrow {self.style.colour}", d=way + head)


@dataclass(frozen=True)
class Area:
    """What lies between two curves, given as (x, low, high), shaded."""

    edges: Sequence[tuple[float, float, float]]
    layer = 0

    def places(self) -> Iterator[Place]:
        yield from ((x, end) for x, *ends in self.edges for end in ends)

    def draw(self, frame: Frame) -> Iterator[Markup]:
        there = [frame.at(x, low) for x, low, _ in self.edges]
        back = [frame.at(x, high) for x, _, high in reversed(self.edges)]
        yield element("path", cls="interval", d=f"M{'L'.join(there + back)}z")


@dataclass(frozen=True)
class Level:
    """A thin horizontal line, named at its end or its begin, above or below it."""

    value: float
    label: str
    at_end: bool = True
    below: bool = False
    layer = 2

    def places(self) -> Iterator[Place]:
        yield None, self.value

    def draw(self, frame: Frame) -> Iterator[Markup]:
        at, stop = frame.y(self.value), frame.x.stop
        yield element("path", cls="level", data_y=f"{self.value:g}", d=f"M{LEFT},{pixels(at)}H{pixels(stop)}")
        x, anchor = (stop - 3, "end") if self.at_end else (LEFT + 4, "start")
        yield words(x, at + (13 if self.below else -5), self.label, "level-name", anchor)


@dataclass(frozen=True)
class Mark:
    """A position on the x axis, named above the drawing, with its interval; an open one reaches to the end."""

    value: float
    low: float | None
    high: float | None
    label: str
    layer = 1

    def places(self) -> Iterator[Place]:
        yield from ()

    def draw(self, frame: Frame) -> Iterator[Markup]:
        base, heat = pixels(frame.y.start), isinstance(frame.x, Steps)
        if self.low is not None:
            high = frame.x.high if self.high is None else self.high
            a, b = (frame.x(_inside(end, frame.x)) for end in (self.low, high))
            ends: dict[str, Any] = {"data_low": f"{self.low:g}", "data_high": f"{high:g}"}
            if heat:  # a band would hide the colours
                yield element("path", cls="interval-rule", **ends, d=f"M{pixels(a)},{TOP - 5}H{pixels(b)}")
            else:
                yield element("rect", cls="interval", **ends, x=pixels(a), y=TOP, width=pixels(b - a),
                              height=pixels(frame.y.start - TOP))  # fmt: skip
        if not frame.x.low <= self.value <= frame.x.high:
            return
        at = frame.x(self.value)
        if heat:
            yield element("path", cls="boundary-halo", d=f"M{pixels(at)},{TOP}V{base}")
        yield element("path", cls="boundary", data_x=f"{self.value:g}", d=f"M{pixels(at)},{TOP - 4}V{base}")
        x, anchor = (at + 3, "end") if at > (frame.x.start + frame.x.stop) / 2 else (at - 3, "start")
        yield words(x, TOP - (10 if heat else 8), self.label, "boundary-name", anchor)


@dataclass(frozen=True)
class Cells:
    """(x, y) -> value as the colours of a heat map with its scale; `tip` says a value in words."""

    values: Mapping[tuple[int, int], float]
    tip: Callable[[int, int, float], str]
    layer = 0

    def places(self) -> Iterator[Place]:
        yield from self.values

    def draw(self, frame: Frame) -> Iterator[Markup]:
        top = max(self.values.values()) or 1.0
        width, height = frame.x.step, -frame.y.step
        for (x, y), value in sorted(self.values.items()):
            yield element(
                "rect", element("title", self.tip(x, y, value)), cls="heat", data_x=x, data_y=y,
                data_value=f"{value:.6g}", x=pixels(frame.x(x) - width / 2), y=pixels(frame.y(y) - height / 2),
                width=pixels(width + 0.3), height=pixels(height + 0.3), fill=ramp(value / top),
            )  # fmt: skip
        left, num, whole = WIDTH - COLOUR_BAR + 16, 40, frame.y.start - TOP
        for i in range(num):
            yield element("rect", x=left, y=pixels(TOP + whole * (1 - (i + 1) / num)), width=12,
                          height=pixels(whole / num + 0.5), fill=ramp((i + 0.5) / num))  # fmt: skip
        for share in (0, 0.5, 1):
            yield words(left + 16, frame.y.start - whole * share + 4, short(float(f"{top * share:.2g}")), "tick")


def _inside(value: float, scale: Any) -> float:
    return min(max(value, scale.low), scale.high)
