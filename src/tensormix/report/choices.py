"""Tables of a budget for which methods competed: the plans that were measured, and what each region became."""

from __future__ import annotations

from collections import Counter

from .figure import Column, Shown, Table, table
from .numbers import METHODS, MISSING, count, percent, short
from .read import Row, Run


def _with_error(value: float | None, error: float | None) -> Shown:
    return Shown(MISSING if value is None else short(value), "" if error is None else f"± {short(error)}")


def contenders_table(run: Run) -> Table | None:
    """Every plan within the budget, the chosen one marked: what its candidates lose alone, and all of it together."""
    rows = run.rows("allocate", "contender")
    if not rows:
        return None
    columns = [
        Column("Plan", lambda row: row["contender"]),
        Column("Cost", lambda row: count(row["cost"])),
        Column("Predicted", lambda row: short(row["predicted"]), "nats, summed"),
        Column("Measured", lambda row: _with_error(row["measured"], row["measured_error"]), "nats a token"),
    ]
    return table("Plans within the budget", columns, rows, marked=lambda row: row["chosen"])


def choices_table(run: Run) -> Table | None:
    """Every method and size that regions took: how many regions, what they cost, and what they lose alone."""
    chosen = [row for row in run.rows("allocate", "candidate") if row["chosen"]]
    if not chosen:
        return None
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in chosen:
        size = MISSING if row["size"] is None else str(row["size"])
        groups.setdefault((_kind(row), row["method"], size), []).append(row)
    names = Counter(_kind(row) for row in chosen)
    items = sorted(groups.items(), key=lambda item: (list(names).index(item[0][0]), -len(item[1])))
    columns = [
        Column("Region", lambda item: item[0][0]),
        Column("Method", lambda item: METHODS.get(item[0][1], item[0][1]), numeric=False),
        Column("Size", lambda item: item[0][2]),
        Column("Blocks", lambda item: ", ".join(str(row["block"]) for row in item[1]), numeric=False),
        Column("Kept", lambda item: percent(_sum(item[1], "cost") / _sum(item[1], "dense_cost")), "of dense"),
        Column("Loss", lambda item: short(_sum(item[1], "loss")), "nats, summed"),
    ]
    return table("What regions became", columns, items)


def _kind(row: Row) -> str:
    """The part of the block: the last word of the region's name, "block" where all of it is taken."""
    last = str(row["region"]).rpartition(".")[2]
    return "block" if last == str(row["block"]) else last


def _sum(rows: list[Row], key: str) -> float:
    return sum(row[key] for row in rows)
