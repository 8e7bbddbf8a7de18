"""Cells of a comparison -> what each method has at each budget, over seeds, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .measures import Record, record
from .numbers import METHODS, number
from .read import Contest, Row

KL = "kl"


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, the least and the largest."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return cls(sum(known) / len(known), min(known), max(known)) if known else None


@dataclass(frozen=True, eq=False)
class Entry:
    """One method at one budget, all its seeds together."""

    label: str
    method: str
    keep: float
    null: bool
    rows: list[Row]
    records: list[Record]
    kl: list[dict[str, float]]  # of each seed: text -> nats

    @property
    def bits(self) -> Spread | None:
        return Spread.of(number(row.get("bits")) for row in self.rows)

    @property
    def achieved(self) -> Spread | None:
        return Spread.of(number(row.get("achieved_keep")) for row in self.rows)

    @property
    def missed(self) -> Spread | None:
        return Spread.of(number(row.get("missed_by")) for row in self.rows)

    @property
    def title(self) -> str:
        said = METHODS.get(self.method, self.method)
        return self.label if self.label in (said, self.method) else f"{self.label} ({said})"

    def quality(self, measure: str, text: str) -> Spread | None:
        """Of "perplexity", "kl" or "accuracy"; `text` names the text of the first two."""
        if measure == KL:
            return Spread.of(seed.get(text) for seed in self.kl)
        if measure == "accuracy":
            return Spread.of(item.accuracy for item in self.records)
        return Spread.of(item.perplexity.get(text) for item in self.records)

    def speed(self, tokens: int) -> Spread | None:
        return Spread.of(item.speedup(tokens) for item in self.records)


def entries(source: Contest) -> list[Entry]:
    """One for each method and budget of which at least one seed has been evaluated, in the order of the cells."""
    found: dict[tuple[str, float], Entry] = {}
    for row, run in source.cells:
        if run is None or "evaluate" not in run.stages:
            continue
        key = (str(row.get("label")), number(row.get("keep")) or 0.0)
        entry = found.setdefault(key, Entry(key[0], str(row.get("method")), key[1], bool(row.get("null")), [], [], []))
        entry.rows.append(row)
        entry.records.append(record(run, run.name, method=entry.method))
        kls = {str(r.get("text")): number(r.get("value")) for r in run.rows("evaluate", KL)}
        entry.kl.append({name: value for name, value in kls.items() if value is not None})
    return list(found.values())


def frontier(
    items: Sequence[Entry], x: Callable[[Entry], Spread | None], y: Callable[[Entry], Spread | None], sign: int = 1
) -> list[Entry]:
    """Those that no other one beats: none has as small an x and a better mean y, from the smallest x on.

    `sign` is 1 where a smaller y is better and -1 where a larger one is.
    """
    placed = [
        (a.mean, sign * b.mean, item) for item in items if (a := x(item)) is not None and (b := y(item)) is not None
    ]
    best: list[Entry] = []
    lowest = float("inf")
    for _, value, item in sorted(placed, key=lambda point: point[:2]):
        if value < lowest:
            best.append(item)
            lowest = value
    return best
