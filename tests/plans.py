"""Plans by their rules."""

from __future__ import annotations

from typing import Any

from tensormix.plan import Plan


def plan_of(*rules: dict[str, Any]) -> Plan:
    return Plan.model_validate(rules)


def one_rule(method: Any, **where: Any) -> Plan:
    return plan_of({"method": method, **where})
