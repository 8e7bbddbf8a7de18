"""What a row of the study compresses with: its plan, and the size at which it stores as many numbers as MixT.

In study.yaml a variant has a `method`, or `rules` with a method each, in which these words stand for numbers:
    KEEP                     the fraction at which the whole variant stores what MixT stores in the same blocks
    MACS                     the fraction at which two thin factors multiply as much as MixT does
    BRANCHES, MORE_BRANCHES  the N_T of the model, and one more
"""

from __future__ import annotations

import math
from typing import Any

from tensormix.compression.kinds import planned_units
from tensormix.plan import Plan

MIXT = {"method": {"name": "mixt"}}
Variant = dict[str, Any]


def plan_of(variant: Variant, where: str, branches: int, keep: float | None = None) -> Plan:
    """The plan of a variant in the blocks `where`, with `keep` in the place of KEEP."""
    rules = variant.get("rules") or [{"method": variant["method"]}]
    numbers = {
        "KEEP": keep,
        "MACS": branches / 2 ** (branches - 1),
        "BRANCHES": branches,
        "MORE_BRANCHES": branches + 1,
    }
    filled = []
    for rule in rules:
        method = {"num_branches": branches} if rule["method"]["name"] == "mixt" else {}
        method |= {key: numbers.get(value, value) for key, value in rule["method"].items()}
        filled.append({"blocks": where} | rule | {"method": method})
    return Plan.model_validate(filled)


def stored(model: Any, plan: Plan) -> int:
    """Numbers that the plan's operators would store."""
    return sum(cost.parameters for unit in planned_units(model, plan) for cost in unit.costs().values())


def has_keep(variant: Variant) -> bool:
    return "KEEP" in str(variant.get("rules") or variant["method"])


def equal_keep(model: Any, where: str, branches: int, variant: Variant) -> float | None:
    """The KEEP at which the variant stores the number nearest to MixT's; None if it has no KEEP.

    Raises ValueError if that is a tenth or more away.
    """
    if not has_keep(variant):
        return None
    wanted = stored(model, plan_of(MIXT, where, branches))

    def miss(keep: float) -> float:
        try:
            return abs(stored(model, plan_of(variant, where, branches, keep)) - wanted)
        except ValueError:  # nothing is left of some layer
            return math.inf

    best = min((step / 1000 for step in range(5, 1000)), key=miss)
    if miss(best) > 0.1 * wanted:
        raise ValueError(
            f"no KEEP stores about the {wanted} numbers of MixT; the nearest, {best}, misses by {miss(best)}"
        )
    return best
