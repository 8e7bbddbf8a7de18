"""The smallest pieces of a drawing: elements, texts, the looks of a series.

Colours come from the page's style sheet (classes `c-...`), so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 46, 46

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


def element(name: str, inner: str = "", /, **attributes: Any) -> Markup:
    """One SVG element with everything escaped; `cls` is the class, "" and None leave an attribute out."""
    pairs = [("class" if key == "cls" else key.replace("_", "-"), value) for key, value in attributes.items()]
    given = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in pairs if value not in ("", None))
    if not inner:
        return Markup("<{}{}/>").format(name, given)
    return Markup("<{}{}>{}</{}>").format(name, given, inner, name)


def words(x: float, y: float, label: str, cls: str = "", anchor: str = "start") -> Markup:
    """One line of text; N_B is set with a lowered B."""
    symbol = Markup('<tspan class="var">N</tspan><tspan class="sub" dy="3">B</tspan><tspan dy="-3">')
    inner = escape(label).replace("N_B", symbol) + Markup("</tspan>") * label.count("N_B")
    return element("text", inner, x=pixels(x), y=pixels(y), cls=cls, text_anchor=anchor)


def pixels(value: float) -> str:
    number = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if number == "-0" else number
