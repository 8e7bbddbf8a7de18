"""Where values lie in a drawing, and in which colour: scales, round ticks, colour ramps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .numbers import tick

CIVIDIS = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
DEPTHS = ("c77c02", "b2578b", "0072b2")  # orange for few replaced blocks, blue for many; on light and dark ground


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


@dataclass(frozen=True)
class Steps:
    """Values in sorted order -> the middles of equally wide steps between the pixels start..stop."""

    values: Sequence[float]
    start: float
    stop: float
    most: int  # ticks, at most

    @property
    def low(self) -> float:
        return self.values[0] - 0.5

    @property
    def high(self) -> float:
        return self.values[-1] + 0.5

    @property
    def step(self) -> float:
        return (self.stop - self.start) / len(self.values)

    def __call__(self, value: float) -> float:
        return self.start + step_place(self.values, value) * self.step

    def ticks(self) -> list[float]:
        sizes = (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000)
        return list(self.values[:: next(size for size in sizes if len(self.values) / size <= self.most)])


def step_place(values: Sequence[float], value: float) -> float:
    """Position in units of steps: 0.5 is the middle of the first; between two of them it is interpolated."""
    if value <= values[0]:
        return 0.5 - min(0.5, values[0] - value)
    for index, (a, b) in enumerate(itertools.pairwise(values)):
        if value <= b:
            return index + 0.5 + (value - a) / (b - a)
    return len(values) - 0.5 + min(0.5, value - values[-1])


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


def padded(values: Sequence[float], share: float = 0.06, log: bool = False, least: float = 0.0) -> tuple[float, float]:
    """Range of the values with some room on both sides, `least` at least; never empty."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    room = max((high - low) * share, least) or max(abs(high) * 0.05, 0.05)
    low, high = low - room, high + room
    return (10**low, 10**high) if log else (low, high)


class Axis(NamedTuple):
    """One axis; it covers everything that is drawn, and `include`."""

    label: str = ""
    format: Callable[[float], str] = tick
    log: bool = False  # only where all values are above 0
    include: Sequence[float] = ()
    room: float = 0.06  # beyond the outermost values, as a share of their range
    least: float = 0.0  # the same in values
    limits: tuple[float, float] = (-math.inf, math.inf)  # never drawn beyond
    span: tuple[float, float] | None = None  # exactly this, whatever is drawn

    def range(self, values: Sequence[float]) -> tuple[float, float]:
        if self.span is not None:
            return self.span
        low, high = padded([*values, *self.include], self.room, self.is_log(values), self.least)
        return max(low, self.limits[0]), min(high, self.limits[1])

    def is_log(self, values: Sequence[float]) -> bool:
        return self.log and min([*values, *self.include]) > 0

    def scale(self, values: Sequence[float], start: float, stop: float) -> Scale:
        return Scale(*self.range(values), start, stop, self.is_log(values))


def between(colours: Sequence[str], share: float) -> str:
    """The colour at `share` (0..1) of the way through equally spaced ones, all of six hexadecimal digits."""
    place = min(max(share, 0.0), 1.0) * (len(colours) - 1)
    left = min(int(place), len(colours) - 2)
    ends = [[int(colours[left + k][i : i + 2], 16) for i in (0, 2, 4)] for k in (0, 1)]
    return "#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in zip(*ends, strict=True))


def ramp(share: float) -> str:
    """Colour of a value at `share` (0..1) of its range (cividis, made for every kind of eye)."""
    return between(CIVIDIS, share)


def depth_colour(share: float) -> str:
    """Line colour of a depth."""
    return between(DEPTHS, share)
