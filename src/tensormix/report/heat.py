"""The heat map: columns are depths, rows are layers, colour is a value (cividis, made for every kind of eye)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .numbers import short, text
from .svg import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, frame, pixels, words

CIVIDIS = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
DEPTHS = ((199, 124, 2), (178, 87, 139), (0, 114, 178))  # orange for few replaced blocks, blue for many
BAR = 58  # width kept for the colour bar


def ramp(share: float) -> str:
    """Colour of a value at `share` (0..1) of its range."""
    place = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    left = min(int(place), len(CIVIDIS) - 2)
    ends = [[int(CIVIDIS[left + k][i : i + 2], 16) for i in (0, 2, 4)] for k in (0, 1)]
    return "#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in zip(*ends, strict=True))


def depth_colour(share: float) -> str:
    """Line colour for a depth, legible on a light and on a dark page."""
    half = min(int(share * 2), 1)
    ends = zip(DEPTHS[half], DEPTHS[half + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (2 * share - half)):02x}" for a, b in ends)


def column_place(columns: Sequence[int], value: float) -> float:
    """Position of a depth in units of columns: 0.5 is the middle of the first; between columns it is interpolated."""
    if value <= columns[0]:
        return 0.5 - min(0.5, columns[0] - value)
    for index, (a, b) in enumerate(itertools.pairwise(columns)):
        if value <= b:
            return index + 0.5 + (value - a) / (b - a)
    return len(columns) - 0.5 + min(0.5, value - columns[-1])


def _every(num: int, room: int) -> int:
    """Label every n-th of `num` so that at most `room` labels remain."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000) if num / step <= room)


def _colour_bar(top: float) -> str:
    x, steps, height = WIDTH - BAR + 16, 40, HEIGHT - BOTTOM - TOP
    parts = [
        f'<rect x="{x}" y="{pixels(TOP + height * (1 - (i + 1) / steps))}" width="12" '
        f'height="{pixels(height / steps + 0.5)}" fill="{ramp((i + 0.5) / steps)}"/>'
        for i in range(steps)
    ]
    labels = [
        words(x + 16, HEIGHT - BOTTOM - height * share + 4, short(float(f"{top * share:.2g}")), "tick")
        for share in (0, 0.5, 1)
    ]
    return "".join(parts + labels)


def _labels(columns: Sequence[int], rows: Sequence[int], width: float, height: float) -> str:
    parts, base = [], HEIGHT - BOTTOM
    step = _every(len(columns), 12)
    for index, depth in enumerate(columns):
        if index % step == 0:
            parts.append(words(LEFT + (index + 0.5) * width, base + 18, str(depth), "tick", "middle"))
    step = _every(len(rows), 9)
    for index, layer in enumerate(rows):
        if index % step == 0:
            parts.append(words(LEFT - 7, base - (index + 0.5) * height + 4, str(layer), "tick", "end"))
    middle = LEFT + len(columns) * width / 2
    parts.append(words(middle, HEIGHT - 8, "N_B, number of blocks replaced", "axis-name", "middle"))
    return "".join(parts)


def _marks(columns: Sequence[int], width: float, marks: Sequence[tuple[float, float | None, float | None]]) -> str:
    parts, base = [], HEIGHT - BOTTOM
    for value, low, high in marks:
        at = LEFT + column_place(columns, value) * width
        if low is not None:
            high = columns[-1] + 0.5 if high is None else high
            a, b = (LEFT + column_place(columns, end) * width for end in (low, high))
            parts.append(
                f'<path class="interval-rule" data-low="{low:g}" data-high="{high:g}" '
                f'd="M{pixels(a)},{TOP - 5}H{pixels(b)}"/>'
            )
        parts.append(f'<path class="boundary-halo" d="M{pixels(at)},{TOP}V{base}"/>')
        parts.append(f'<path class="boundary" data-x="{value:g}" d="M{pixels(at)},{TOP - 4}V{base}"/>')
        near_end = at > (LEFT + WIDTH - BAR) / 2
        parts.append(
            words(
                at + (3 if near_end else -3),
                TOP - 10,
                f"boundary N_B = {value:g}",
                "boundary-name",
                "end" if near_end else "start",
            )
        )
    return "".join(parts)


def heat_map(
    values: dict[tuple[int, int], float],
    *,
    title: str,
    value_name: str,
    description: str,
    marks: Sequence[tuple[float, float | None, float | None]] = (),
) -> str:
    """(depth, layer) -> value, layer 0 at the bottom; `marks` are (position, low, high) on the depth axis."""
    columns = sorted({depth for depth, _ in values})
    rows = sorted({layer for _, layer in values})
    top = max(values.values()) or 1.0
    width, height = (WIDTH - BAR - LEFT) / len(columns), (HEIGHT - BOTTOM - TOP) / len(rows)
    parts = []
    for (depth, layer), value in sorted(values.items()):
        x, y = LEFT + columns.index(depth) * width, HEIGHT - BOTTOM - (rows.index(layer) + 1) * height
        tip = f"N_B = {depth}, start layer {layer}: {value_name} {short(value)}"
        parts.append(
            f'<rect class="heat" data-x="{depth}" data-y="{layer}" data-value="{value:.6g}" x="{pixels(x)}" '
            f'y="{pixels(y)}" width="{pixels(width + 0.3)}" height="{pixels(height + 0.3)}" fill="{ramp(value / top)}">'
            f"<title>{text(tip)}</title></rect>"
        )
    inner = "".join(parts) + _marks(columns, width, marks) + _labels(columns, rows, width, height) + _colour_bar(top)
    return frame(title, description, inner)
