"""Whether a compressed model is larger than what it was made of, and what made it so."""

from __future__ import annotations

from collections.abc import Iterable

from tensormix.rows import Row


def growth(before: int, after: int, rows: Iterable[Row] = ()) -> str | None:
    """A sentence if `after` numbers are more than those `before`; None if they are not.

    `rows` of `compress` or `check` say which of its parts grew: a head that was tied to the embedding held nothing of
    its own before.
    """
    if after <= before:
        return None
    more = {row["site"]: row["parameters"] - row["dense_parameters"] for row in rows if row["method"] != "dense"}
    tied = {row["site"] for row in rows if row["dense_parameters"] == 0}
    grown = sorted((site for site in more if more[site] > 0), key=lambda site: -more[site])
    named = [f"{site} {more[site]:+,}{' (it was tied to the embedding)' if site in tied else ''}" for site in grown[:3]]
    why = f" What grew: {', '.join(named)}{' and others' if len(grown) > 3 else ''}." if named else ""
    return (
        f"The compressed model is larger than its source: {after:,} numbers from {before:,} "
        f"({100 * (after / before - 1):+.1f} %).{why}"
    )


def growth_of(rows: Iterable[Row], whole: int | None = None) -> str | None:
    """As `growth`, from rows of `compress` alone: of the sites, or of a model of `whole` numbers before."""
    rows = list(rows)
    before = sum(row["dense_parameters"] for row in rows)
    after = sum(row["parameters"] for row in rows)
    return growth(before, after, rows) if whole is None else growth(whole, whole + after - before, rows)
