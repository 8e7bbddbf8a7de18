"""Small SVG drawings: scales, axes, lines, points with intervals, bands, heat maps.

Colours come from the page's style sheet (classes `c-...`), so that one drawing serves light, dark and print.
Every point carries its values twice: as `data-x`, `data-y` (as given) and as a `<title>` sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .numbers import text, tick

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 46, 46
HEAD = 7.0  # pixels of an arrow's head


@dataclass(frozen=True)
class Scale:
    """Data values low..high -> pixels start..stop."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) inside low..high, at most `most` of them."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * power for size in (1, 2, 5, 10, 20) if (high - low) / (size * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sizes = (1,) if len(decades) > 4 else (1, 3) if len(decades) > 3 else (1, 2, 5)
    ticks = [size * 10.0**power for power in decades for size in sizes]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside if len(inside) > 1 else nice_ticks(low, high)


def padded(values: Sequence[float], share: float = 0.06, log: bool = False) -> tuple[float, float]:
    """Range of the values with some room on both sides; never empty."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    room = (high - low) * share or max(abs(high) * 0.05, 0.05)
    low, high = low - room, high + room
    return (10**low, 10**high) if log else (low, high)


def pixels(value: float) -> str:
    number = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if number == "-0" else number


def words(x: float, y: float, label: str, cls: str = "", anchor: str = "start") -> str:
    """One line of text; N_B is set with a lowered B."""
    inner = text(label).replace("N_B", '<tspan class="var">N</tspan><tspan class="sub" dy="3">B</tspan><tspan dy="-3">')
    inner += "</tspan>" * label.count("N_B")
    return f'<text x="{pixels(x)}" y="{pixels(y)}" class="{cls}" text-anchor="{anchor}">{inner}</text>'


SHAPES: dict[str, Callable[[float], str]] = {
    "circle": lambda r: f"M{-r},0a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0z",
    "square": lambda r: f"M{-r * 0.9:g},{-r * 0.9:g}h{r * 1.8:g}v{r * 1.8:g}h{-r * 1.8:g}z",
    "triangle": lambda r: f"M0,{-r * 1.2:g}L{r * 1.15:g},{r * 0.85:g}H{-r * 1.15:g}z",
    "diamond": lambda r: f"M0,{-r * 1.3:g}L{r * 1.3:g},0L0,{r * 1.3:g}L{-r * 1.3:g},0z",
    "down": lambda r: f"M0,{r * 1.2:g}L{r * 1.15:g},{-r * 0.85:g}H{-r * 1.15:g}z",
    "cross": lambda r: f"M{-r},{-r}L{r},{r}M{-r},{r}L{r},{-r}",
    "plus": lambda r: f"M{-r * 1.2:g},0H{r * 1.2:g}M0,{-r * 1.2:g}V{r * 1.2:g}",
    "star": lambda r: (
        "M" + "L".join(f"{q * r * math.sin(i * math.pi / 5):.2f},{-q * r * math.cos(i * math.pi / 5):.2f}"
                       for i, q in enumerate([1.7, 0.75] * 5)) + "z"
    ),
}  # fmt: skip


OPEN = ("cross", "plus")  # drawn as strokes, without an inside


@dataclass(frozen=True)
class Style:
    """How one series looks: colour class, marker shape, hollow markers with a dashed line."""

    colour: str
    shape: str = "circle"
    hollow: bool = False

    @property
    def classes(self) -> str:
        return f"{self.colour}{' hollow' if self.hollow else ''}{' open' if self.shape in OPEN else ''}"


@dataclass(frozen=True)
class Point:
    """A measured value; `low`, `high` its interval; `tip` the sentence shown on hover."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


def swatch(style: Style) -> str:
    """The small picture of a series in a legend."""
    path = SHAPES[style.shape](4.5)
    return (
        f'<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true"><path class="line {style.classes}" d="M1,7H29"/>'
        f'<path class="mark {style.classes}" transform="translate(15,7)" d="{path}"/></svg>'
    )


class Panel:
    """One drawing with axes; parts are drawn in the order in which they are added."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        title: str,
        x_label: str,
        description: str,
        log_x: bool = False,
        log_y: bool = False,
        x_format: Callable[[float], str] = tick,
        y_format: Callable[[float], str] = tick,
        right: int = RIGHT,
    ) -> None:
        self.x = Scale(*x, LEFT, WIDTH - right, log_x)
        self.y = Scale(*y, HEIGHT - BOTTOM, TOP, log_y)
        self.title, self.x_label, self.description = title, x_label, description
        self.x_format, self.y_format = x_format, y_format
        self.parts: list[str] = []

    def band(self, low: float, high: float, cls: str, axis: str = "x") -> None:
        """Shade low..high along one axis, cut at the edges of the drawing."""
        scale = self.x if axis == "x" else self.y
        a, b = (scale(min(max(value, scale.low), scale.high)) for value in (low, high))
        if axis == "x":
            box = f'x="{pixels(a)}" y="{TOP}" width="{pixels(b - a)}" height="{pixels(self.y.start - TOP)}"'
        else:
            box = f'x="{LEFT}" y="{pixels(b)}" width="{pixels(self.x.stop - LEFT)}" height="{pixels(a - b)}"'
        self.parts.append(f'<rect class="{cls}" data-low="{low:g}" data-high="{high:g}" {box}/>')

    def vertical(self, value: float, label: str, cls: str) -> None:
        """A marked position on the x axis, named above the drawing."""
        if not self.x.low <= value <= self.x.high:
            return
        at = self.x(value)
        near_end = at > (self.x.start + self.x.stop) / 2
        self.parts.append(
            f'<path class="{cls}" data-x="{value:g}" d="M{pixels(at)},{TOP - 4}V{pixels(self.y.start)}"/>'
        )
        self.parts.append(
            words(at + (3 if near_end else -3), TOP - 8, label, f"{cls}-name", "end" if near_end else "start")
        )

    def horizontal(self, value: float, label: str, cls: str, at_end: bool, below: bool = False) -> None:
        """A reference level, named at one end of the line."""
        at = self.y(value)
        self.parts.append(f'<path class="{cls}" data-y="{value:g}" d="M{LEFT},{pixels(at)}H{pixels(self.x.stop)}"/>')
        x = self.x.stop - 3 if at_end else LEFT + 4
        self.parts.append(words(x, at + (13 if below else -5), label, "level-name", "end" if at_end else "start"))

    def line(self, points: Sequence[tuple[float, float]], style: Style, colour: str = "") -> None:
        """A line through (x, y); `colour` overrides the style's with a fixed one."""
        steps = "L".join(f"{pixels(self.x(x))},{pixels(self.y(y))}" for x, y in points)
        fixed = f' style="stroke:{colour}"' if colour else ""
        self.parts.append(f'<path class="line {style.classes}" d="M{steps}"{fixed}/>')

    def arrow(self, begin: tuple[float, float], end: tuple[float, float], style: Style, gap: float = 6.5) -> None:
        """From one value to another; the head ends `gap` pixels before the mark there. Too short a way is not drawn."""
        (x0, y0), (x1, y1) = ((self.x(x), self.y(y)) for x, y in (begin, end))
        way = math.hypot(x1 - x0, y1 - y0)
        if way < gap + HEAD:
            return
        along, across = ((x1 - x0) / way, (y1 - y0) / way), ((y0 - y1) / way, (x1 - x0) / way)

        def at(back: float, side: float = 0.0) -> str:
            """A point `back` pixels before the end and `side` pixels beside the line."""
            return (
                f"{pixels(x1 - back * along[0] + side * across[0])},{pixels(y1 - back * along[1] + side * across[1])}"
            )

        head = f"M{at(gap + HEAD, HEAD / 2)}L{at(gap)}L{at(gap + HEAD, -HEAD / 2)}"
        self.parts.append(f'<path class="arrow {style.colour}" d="M{pixels(x0)},{pixels(y0)}L{at(gap)}{head}"/>')

    def area(self, edges: Sequence[tuple[float, float, float]], cls: str) -> None:
        """Shade what lies between two curves, given as (x, low, high)."""
        there = [f"{pixels(self.x(x))},{pixels(self.y(low))}" for x, low, _ in edges]
        back = [f"{pixels(self.x(x))},{pixels(self.y(high))}" for x, _, high in reversed(edges)]
        self.parts.append(f'<path class="{cls}" d="M{"L".join(there + back)}z"/>')

    def points(self, points: Sequence[Point], style: Style, size: float = 4.2, colour: str = "") -> None:
        """Markers with their intervals; `colour` fills them with a fixed one instead of the style's."""
        fixed = f' style="fill:{colour}"' if colour else ""
        for point in points:
            x = pixels(self.x(point.x))
            if point.low is not None and point.high is not None:
                low, high = (pixels(self.y(min(max(v, self.y.low), self.y.high))) for v in (point.low, point.high))
                self.parts.append(f'<path class="bar {style.classes}" d="M{x},{low}V{high}"/>')
            self.parts.append(
                f'<path class="mark {style.classes}" data-x="{point.x:.10g}" data-y="{point.y:.10g}" '
                f'transform="translate({x},{pixels(self.y(point.y))})" d="{SHAPES[style.shape](size)}"{fixed}>'
                f"<title>{text(point.tip)}</title></path>"
            )

    def series(self, points: Sequence[Point], style: Style) -> None:
        """Line, intervals and markers of one series."""
        if len(points) > 1:
            self.line([(point.x, point.y) for point in points], style)
        self.points(points, style)

    def _axes(self) -> str:
        base, parts = self.y.start, []
        for value in self.y.ticks():
            at = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT},{pixels(at)}H{pixels(self.x.stop)}"/>')
            parts.append(words(LEFT - 7, at + 4, self.y_format(value), "tick", "end"))
        for value in self.x.ticks():
            at = self.x(value)
            parts.append(f'<path class="axis" d="M{pixels(at)},{base}v5"/>')
            parts.append(words(at, base + 18, self.x_format(value), "tick", "middle"))
        parts.append(f'<path class="axis" d="M{LEFT},{base}H{pixels(self.x.stop)}"/>')
        parts.append(words((LEFT + self.x.stop) / 2, HEIGHT - 8, self.x_label, "axis-name", "middle"))
        return "".join(parts)

    def svg(self, cls: str = "") -> str:
        return frame(self.title, self.description, self._axes() + "".join(self.parts), cls)


def frame(title: str, description: str, inner: str, cls: str = "") -> str:
    """The svg element around a drawing; the description is what a screen reader says."""
    return (
        f'<svg class="panel {cls}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{text(description)}">{words(4, 16, title, "panel-name")}{inner}</svg>'
    )
