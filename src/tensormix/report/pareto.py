"""Cells of a comparison -> what each method has at each budget, over seeds, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .measures import Record, record, values
from .numbers import METHODS, number, percent, short
from .read import Contest, Row


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

    def __truediv__(self, whole: float) -> Spread:
        return Spread(self.mean / whole, self.low / whole, self.high / whole)


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

    def stated(self, key: str) -> Spread | None:
        """What comparison.json says of its cells: "bits", "achieved_keep", "missed_by"."""
        return Spread.of(number(row[key]) for row in self.rows)

    @property
    def title(self) -> str:
        name = METHODS.get(self.method, self.method)
        return self.label if self.label in (name, self.method) else f"{self.label} ({name})"

    def speed(self, tokens: int) -> Spread | None:
        return Spread.of(item.speedup(tokens) for item in self.records)


@dataclass(frozen=True)
class Measure:
    """A kind of quality; `text` names the text of a perplexity or divergence."""

    kind: str  # "perplexity", "kl", "accuracy"
    text: str = ""

    @property
    def name(self) -> str:
        names = {"perplexity": "Perplexity", "kl": "KL from the dense model, nats", "accuracy": "Exam accuracy"}
        return names[self.kind]

    @property
    def sign(self) -> int:
        """1: less is better; -1: more is."""
        return -1 if self.kind == "accuracy" else 1

    def of(self, entry: Entry) -> Spread | None:
        if self.kind == "kl":
            return Spread.of(seed.get(self.text) for seed in entry.kl)
        return Spread.of(self.of_record(item) for item in entry.records)

    def of_record(self, item: Record) -> float | None:
        """Of one model; the dense one has a divergence of 0."""
        if self.kind == "kl":
            return 0.0
        return item.accuracy if self.kind == "accuracy" else item.perplexity.get(self.text)

    def show(self, value: float | None) -> str:
        return percent(value) if self.kind == "accuracy" else short(value)

    def span(self, value: Spread) -> str:
        return "" if value.low == value.high else f"{self.show(value.low)} to {self.show(value.high)}"


def entries(source: Contest) -> list[Entry]:
    """One for each method and budget of which at least one seed has been evaluated, in the order of the cells."""
    found: dict[tuple[str, float], Entry] = {}
    for row, run in source.cells:
        if run is None or "evaluate" not in run.stages:
            continue
        new = Entry(row["label"], row["method"], row["keep"], row["null"], [], [], [])
        entry = found.setdefault((new.label, new.keep), new)
        entry.rows.append(row)
        entry.records.append(record(run, run.name, method=entry.method))
        entry.kl.append(values(run.rows("evaluate", "kl"), "text"))
    return list(found.values())


def measures_of(items: Sequence[Entry]) -> list[Measure]:
    """Everything that was measured, perplexities first."""
    texts = dict.fromkeys(name for item in items for r in item.records for name in r.perplexity)
    found = [Measure("perplexity", name) for name in texts]
    found += [
        Measure("kl", name) for name in dict.fromkeys(name for item in items for seed in item.kl for name in seed)
    ]
    accuracy = Measure("accuracy")
    return [*found, accuracy] if any(accuracy.of(item) for item in items) else found


def lengths_of(items: Sequence[Entry]) -> list[int]:
    """Numbers of tokens for which times were measured."""
    return sorted({tokens for item in items for r in item.records for tokens in r.latency})


def frontier(
    items: Sequence[Entry],
    x: Callable[[Entry], Spread | None],
    y: Callable[[Entry], Spread | None],
    sign: int = 1,
    sign_x: int = 1,
) -> list[Entry]:
    """Those that no other one beats: none has as good an x and a better mean y, from the best x on.

    A sign is 1 where less is better and -1 where more is.
    """
    placed = [
        (sign_x * a.mean, sign * b.mean, item)
        for item in items
        if (a := x(item)) is not None and (b := y(item)) is not None
    ]
    best: list[Entry] = []
    lowest = float("inf")
    for _, value, item in sorted(placed, key=lambda point: point[:2]):
        if value < lowest:
            best.append(item)
            lowest = value
    return best


def winners(items: Sequence[Entry], measure: Measure) -> list[tuple[str, str]]:
    """The best label at each budget, from the largest on."""
    found = []
    for keep in sorted({item.keep for item in items}, reverse=True):
        group = [(measure.sign * q.mean, item) for item in items if item.keep == keep and (q := measure.of(item))]
        if group:
            found.append((min(group, key=lambda pair: pair[0])[1].label, f"{keep:g}"))
    return found


def losers(items: Sequence[Entry], measure: Measure) -> list[tuple[str, str]]:
    """(label, budget) of what is no better than the best null baseline at its budget."""
    found = []
    for item in items:
        value = measure.of(item)
        rivals = [measure.sign * q.mean for i in items if i.null and i.keep == item.keep and (q := measure.of(i))]
        if not item.null and value is not None and rivals and measure.sign * value.mean >= min(rivals):
            found.append((item.label, f"{item.keep:g}"))
    return found
