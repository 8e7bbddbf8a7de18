"""Records -> the series of a chart: colour and shape of each, its points, and what the points say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count

from .boundary import Boundary
from .measures import Key, Record, by_series
from .numbers import percent, short, whole
from .parts import Mark, Point, Series
from .scales import Axis
from .svg import Style

Styles = dict[Key, Style]
MIXT = (("c-blue", "circle"), ("c-green", "diamond"), ("c-sky", "down"), ("c-yellow", "plus"))
OTHERS = {
    "zero": ("c-orange", "square"),
    "drop_blocks": ("c-purple", "triangle"),
    "mean_output": ("c-ink", "cross"),
    "svd": ("c-green", "star"),
}
DENSE = Style("c-ink", "star")
STYLES = (  # of groups that have no look of their own
    Style("c-blue", "circle"),
    Style("c-sky", "down"),
    Style("c-green", "diamond"),
    Style("c-purple", "triangle"),
    Style("c-orange", "square"),
    Style("c-red", "star"),
    Style("c-ink", "plus"),
    Style("c-yellow", "cross"),
)
DEPTH = Axis("N_B, number of blocks replaced", whole, include=(0.0,), room=0.03)
BLOCK = Axis("block, counted from 0", whole, least=0.5)


def look(index: int) -> Style:
    """The looks of groups that have none of their own, all different up to 64."""
    rounds, place = divmod(index, len(STYLES))
    return Style(STYLES[place].colour, STYLES[(place + rounds) % len(STYLES)].shape)


def styles_of(records: Iterable[Record]) -> Styles:
    """Colour by method and branches, shape likewise, hollow and dashed for front to back."""
    keys = list(dict.fromkeys(item.series for item in records))
    mixts = sorted({key[2] or 0 for key in keys if key[0] == "mixt"}, key=lambda num: (num != 4, num))
    taken = {*MIXT, *OTHERS.values()}
    free = ((own.colour, own.shape) for own in map(look, count()) if (own.colour, own.shape) not in taken)
    looks = dict(OTHERS)
    styles = {}
    for key in keys:
        if key[0] == "mixt":
            colour, shape = MIXT[mixts.index(key[2] or 0) % len(MIXT)]
        else:
            colour, shape = looks[key[0]] = looks.get(key[0]) or next(free)
        styles[key] = Style(colour, shape, hollow=key[1] != "last")
    return styles


def styles_in_order(names: Iterable[str]) -> dict[str, Style]:
    return {name: look(index) for index, name in enumerate(dict.fromkeys(names))}


def where(item: Record) -> str:
    return "dense model" if item.method == "dense" else f"{item.label}, N_B = {item.depth}"


def point(item: Record, x: float | None, y: float | None, say: str, interval: bool = False) -> Point | None:
    """A point that says whose it is; None where a value is missing."""
    if x is None or y is None:
        return None
    return Point(x, y, f"{where(item)}: {say}", *((item.low, item.high) if interval else (None, None)))


def accuracy_words(item: Record) -> str:
    words = f"accuracy {percent(item.accuracy)}"
    if item.low is not None and item.high is not None:
        words += f" [{percent(item.low)}, {percent(item.high)}]"
    return words


def series_of(
    dense: Record | None,
    records: Sequence[Record],
    styles: Styles,
    place: Callable[[Record], Point | None],
    line: bool = True,
) -> list[Series]:
    """The dense model, then one series a method: MixT on top, null baselines below.

    With `line` the points are joined, and each line begins at the dense model where that was measured.
    """
    origin = place(dense) if dense is not None else None
    found = [Series([origin], DENSE, "dense model")] if origin is not None else []
    start = (origin.x, origin.y) if line and origin is not None else None
    groups = by_series(records)
    for key in sorted(groups, key=lambda key: (key[0] != "mixt", key[1] != "last")):
        points = [at for item in groups[key] if (at := place(item)) is not None]
        if points:
            found.append(Series(points, styles[key], groups[key][0].label, line, start))
    return found


def boundary_marks(boundaries: Sequence[Boundary]) -> list[Mark]:
    """The known boundaries with their intervals; those at one place are one mark, which names them all."""
    places: dict[tuple[float, float | None, float | None], list[Boundary]] = {}
    for item in boundaries:
        if item.value is not None:
            places.setdefault((item.value, item.low, item.high), []).append(item)
    marks = []
    for (value, low, high), there in places.items():
        branches = [str(item.series[2]) for item in there if item.series[2] is not None]
        several = len(places) > 1 and branches
        words = f"N_B = {short(value)} ({', '.join(branches)} br.)" if several else f"boundary N_B = {short(value)}"
        marks.append(Mark(value, low, high, words))
    return marks
