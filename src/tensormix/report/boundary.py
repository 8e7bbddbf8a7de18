"""The boundaries that a sweep has written, and the plain facts of a whole sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .measures import Key, Record
from .numbers import NARROW, number, series_name, short
from .read import Row, Sweep


@dataclass(frozen=True)
class Boundary:
    """First N_B at which accuracy has left its plateau, with its interval; `value` None: it never left.

    `high` None while `value` is known: the interval is open, the boundary may lie beyond the scanned depths.
    """

    row: Row

    @property
    def value(self) -> float | None:
        return number(self.row["value"])

    @property
    def low(self) -> float | None:
        return number(self.row["low"])

    @property
    def high(self) -> float | None:
        return number(self.row["high"])

    @property
    def last_good(self) -> int:
        return self.row["last_good"]

    @property
    def series(self) -> Key:
        return (self.row["method"], self.row["direction"], self.row["num_branches"])

    @property
    def label(self) -> str:
        return series_name(*self.series)

    @property
    def is_main(self) -> bool:
        """Of MixT, back to front: what the headline is about and the figures mark."""
        return self.series[:2] == ("mixt", "last")

    @property
    def interval(self) -> str:
        """ "12 to 15", "12 or later", or nothing."""
        if self.value is None or self.low is None:
            return ""
        if self.high is None:
            return f"{short(self.low)} or later"
        return short(self.low) if self.low == self.high else f"{short(self.low)} to {short(self.high)}"

    @property
    def confidence(self) -> str:
        return f"{100 * self.row['confidence']:.4g}{NARROW}%"

    def last_record(self, records: Iterable[Record]) -> Record | None:
        """The deepest checkpoint of the series that is still on the plateau."""
        return next((item for item in records if item.series == self.series and item.depth == self.last_good), None)


def boundaries(sweep: Sweep) -> list[Boundary]:
    """The boundaries of accuracy that the sweep has written, the main one (MixT, back to front) first."""
    found = [Boundary(row) for row in sweep.boundary if row["kind"] == "boundary"]
    return sorted(found, key=lambda item: (item.series[0] != "mixt", item.series[1] != "last"))


def main_boundaries(boundaries: Iterable[Boundary]) -> list[Boundary]:
    return [item for item in boundaries if item.is_main]


def marks_of(item: Record, boundaries: Iterable[Boundary], records: Sequence[Record]) -> list[str]:
    """In words: is this checkpoint the last on the plateau, or the first past its boundary?"""
    found = []
    for boundary in boundaries:
        if boundary.series != item.series or boundary.value is None or item.depth is None:
            continue
        if item is boundary.last_record(records):
            found.append("last on the plateau")
        past = [r.depth or 0 for r in records if r.series == item.series and (r.depth or 0) >= boundary.value]
        if past and item.depth == min(past):
            found.append("boundary")
    return found


def num_blocks(sweep: Sweep) -> int | None:
    """Number of blocks of the model, from its layers or sites (the last block is always replaced first)."""
    runs = [(cell, cell.run) for cell in sweep.cells if cell.run is not None]
    layers = [row["layer"] for _, run in runs for row in run.rows("diagnose", "drift_profile")]
    blocks = [row["block"] for cell, run in runs if cell.direction == "last" for row in run.rows("compress")]
    known = layers or [block for block in blocks if block is not None]
    return max(known) + 1 if known else None  # layer 0 enters the first block, and the last has none after it


def model_name(recipe: Any) -> str | None:
    """The value of the first key `model` that holds text, outermost first."""
    if not isinstance(recipe, dict):
        return None
    if isinstance(recipe.get("model"), str):
        return recipe["model"]
    return next((name for name in map(model_name, recipe.values()) if name), None)


def sweep_model(sweep: Sweep) -> str:
    recipes = [cell.run.recipe for cell in sweep.cells if cell.run is not None]
    return next((name for name in map(model_name, [sweep.settings, *recipes]) if name), sweep.name)
