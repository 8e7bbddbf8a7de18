"""One unit: watch its inputs, put its operators in their places, and say in a row for each site what came of it.

Shape letters: I in_features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from tensormix.compression.units import Statistics, Unit, at_sites, cost_with
from tensormix.operators import Cost, Owner
from tensormix.rows import Row
from tensormix.sites import Site, install
from tensormix.sites.installing import install_owners


def replace(
    unit: Unit,
    stats: Statistics,
    dense_bits: Callable[[Site], int],
    tidy: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Fit a unit and put all its operators there: all of them, or none if one cannot be fitted. One row for each.

    The first row has the seconds of all.

    Args:
        stats: by site name; those of the unit are taken out.
        dense_bits: what a dense weight takes where it is stored.
        tidy: called after each expert, and when the statistics are no longer needed.

    Raises ValueError, naming the site, if the method cannot be fitted there or the fit is not finite.
    """
    start, sites = time.perf_counter(), {site.name: site for site in unit.sites}
    needed = {name: stats.pop(name) for name in unit.needs() if name in stats}
    fitted = unit.fit(needed, tidy)
    needed.clear()
    tidy()
    dense = {name: site.cost(dense_bits(site)) for name, site in sites.items()}
    rows: list[Row] = []
    install_owners(unit.model, fitted.operators)
    for name, (operator, owners) in at_sites(fitted.operators).items():
        install(unit.model, name, operator, move_bias=unit.moves_bias)
        facts = {**fitted.facts.get(name, {}), "seconds": 0.0 if rows else time.perf_counter() - start}
        rows.append(row_of(unit, name, operator, dense.get(name, Cost(0, 0, 0, 0)), facts, owners))
    return rows


def row_of(unit: Unit, name: str, operator: Any, dense: Cost, facts: Row, owners: Iterable[Owner] = ()) -> Row:
    """What there is to say about a site; `dense` is what it cost before, and `owners` are counted with it."""
    site = next((site for site in unit.sites if site.name == name), None)
    cost = cost_with(operator, owners, 1 if site is None else site.experts_per_token)
    return {
        "site": name,
        "block": unit.last_block if site is None else site.block,
        "role": None if site is None else site.role,
        "method": unit.method.name,
        "operator": type(operator).__name__,
        "dense_parameters": dense.parameters,
        "parameters": cost.parameters,
        "dense_bits": dense.bits,
        "bits": cost.bits,
        "dense_macs_per_token": dense.macs,
        "macs_per_token": cost.macs,
        **facts,
    }
