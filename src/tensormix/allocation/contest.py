"""Methods that compete under one budget: candidates are measured alone, the best plans of them whole, and one stays.

Some of the calibration windows are kept from all fits: on the first tokens of them each candidate is measured, and on
all of them the plans are. So the plan that stays loses no more than the best plan of any single method, on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Any

from torch import Tensor, nn

from tensormix.allocation.choice import Chosen, best_choice, contestants, plan_of
from tensormix.allocation.competition import compete
from tensormix.allocation.outcome import Allocation, ImpossibleBudget, cost_of_model, impossible, total_row
from tensormix.allocation.regions import Candidate, Region, Regions
from tensormix.allocation.rises import Rise, Rises, first_tokens
from tensormix.compression import Calibration, Home, Progress, compress
from tensormix.compression.kinds import planned_units
from tensormix.models import ModelSource
from tensormix.plan import Plan
from tensormix.rows import Row
from tensormix.settings import Budget
from tensormix.sites import Site


@dataclass
class Contest:
    """One budget for the methods of one rule.

    Args:
        model: dense, whole and in memory; it is as it was afterwards.
        home: says what dense weights take where they are stored.
        fresh: gives the dense model anew, for a plan to be tried on.
        progress: told of candidates and plans done, of all, and the name of the last.

    Raises ValueError as `Regions` does, and if the budget asks for what is not measured here.
    """

    model: nn.Module
    source: ModelSource
    home: Home
    plan: Plan
    budget: Budget
    fresh: Callable[[], nn.Module]
    progress: Progress = lambda done, total, name: None
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        rule, budget = self.plan.choice, self.budget
        assert rule is not None
        self.auto: Any = rule.method
        self.auto.check_budget(budget.by, budget.measure)
        self.parts = Regions(self.model, rule, self.home, budget.of, budget.keep)
        sites = self.parts.dense_cost
        self.whole = sites if budget.over == "sites" else cost_of_model(self.model, budget.of, self.source)
        self.outside = self.whole - sites
        self.units = floor(budget.keep * (1 + 2**-50) * self.whole) - self.outside
        self.labels = list(self.auto.labels)
        self.total = sum(len(region.candidates) for region in self.parts.regions) + 1 + 2 * len(self.labels)
        self._check_possible()

    def _check_possible(self) -> None:
        costs = {candidate: 0.0 for region in self.parts.regions for candidate in region.candidates}
        if contestants(self.parts.regions, costs, (), self.units, self.budget.keep)[0]:
            return
        cheapest = contestants(self.parts.regions, costs, (), self.parts.dense_cost, 1.0)[0][0]
        raise ImpossibleBudget(
            f"{impossible(self.budget, (cheapest.cost + self.outside) / self.whole)} with {', '.join(self.labels)}"
        )

    def foreseen(self) -> Allocation:
        """What may come of it, before anything is measured: as if a candidate lost as much as it saves."""
        saved = {c: float(r.dense_cost - c.cost) for r in self.parts.regions for c in r.candidates}
        chosen = best_choice("auto", self.parts.regions, saved, self.units, most=1)
        assert chosen is not None  # or the budget would have been impossible
        return Allocation(plan_of(chosen.choice), self._rows([], chosen, {}, []))

    def decided(self, calibration: Calibration) -> Allocation:
        """The plan that stays, and the rows about it: the budget, its sites, every plan, every candidate."""
        fit, apart = split_windows(list(calibration.batches or ()), self.auto.part)
        alone = Rises(self.model, first_tokens(apart, self.auto.tokens), self.budget.measure)
        losses = compete(
            self.model, self.parts.regions, fit, alone, calibration.precision, calibration.activations, self._tell
        )
        means = {candidate: rise.mean for candidate, rise in losses.items()}
        plans, unable = contestants(self.parts.regions, means, self.labels, self.units, self.budget.keep)
        if not plans:  # what was refused by its fit would have been small enough
            self._check_possible()
        self.total = self.done + len(plans)
        whole = Rises(self.model, apart, self.budget.measure, from_blocks=False)
        measured: dict[Chosen, Rise] = {}
        for chosen in plans:  # those of one size everywhere last, and only where they might be better
            if not chosen.is_uniform or chosen.predicted < min(rise.mean for rise in measured.values()):
                measured[chosen] = self._tried(chosen, fit, calibration, whole)
        best = min(measured, key=lambda chosen: measured[chosen].mean)  # of equal ones the first, which is that of all
        tokens = sum(batch.numel() for batch in apart)
        rows = [contender_row(chosen, measured.get(chosen), tokens, chosen is best) for chosen in plans]
        rows += [contender_row(label, None, tokens, False) for label in unable]
        others = {chosen.name: plan_of(chosen.choice) for chosen in measured}
        return Allocation(plan_of(best.choice), self._rows(rows, best, losses, self.labels), others)

    def _tell(self, name: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, name)

    def _tried(self, chosen: Chosen, fit: Sequence[Tensor], calibration: Calibration, whole: Rises) -> Rise:
        """What the model loses by the whole plan, compressed as a run would, on the windows that no fit saw."""
        model = self.fresh()
        compress(model, plan_of(chosen.choice), fit, inputs=calibration.inputs, precision=calibration.precision)
        rise = whole.of(model)
        self._tell(f"plan {chosen.name}")
        return rise

    def _rows(self, contenders: list[Row], best: Chosen, losses: dict[Candidate, Rise], labels: list[str]) -> list[Row]:
        sizes = self._size_rows(best)
        total = total_row(self.budget, self.whole, self.units + self.outside, self.outside, sizes)
        total |= {"by": self.auto.name, "error": best.predicted if labels else 0.0}
        candidates = [row for region in self.parts.regions for row in candidate_rows(region, best, losses)]
        return [total, *sizes, *contenders, *(candidates if labels else ())]

    def _size_rows(self, best: Chosen) -> list[Row]:
        """One for each site that the budget is over, blocks where they are taken whole."""
        left = {n: c for unit in planned_units(self.model, plan_of(best.choice)) for n, c in unit.costs().items()}
        taken = {s.name: (c, m) for c in best.choice.values() for s, m in _by_site(c)}
        gone = {region.block for region in best.choice if region.is_block}
        rows: list[Row] = []
        for region in self.parts.regions:
            if region.is_block != (region.block in gone):
                continue
            for site in region.sites:
                dense = region.dense_cost if region.is_block else self.parts.dense_cost_of(site)
                candidate, method = taken.get(site.name, (None, None))
                cost = getattr(left[site.name], self.budget.of) if site.name in left else dense
                rows.append(size_row(site, candidate, method, cost, dense))
        return rows


def _by_site(candidate: Candidate) -> list[tuple[Site, Any]]:
    return [(site, unit.method) for unit in candidate.units for site in unit.sites]


def size_row(site: Site, candidate: Candidate | None, method: Any, cost: int, dense: int) -> Row:
    inner: Any = getattr(method, "of", None) or method
    setting = None if inner is None else inner.size
    size = None if setting is None else getattr(inner, setting)
    if setting is not None and inner is not method:
        setting = f"of.{setting}"
    return {
        "kind": "size",
        "site": site.name,
        "block": site.block,
        "role": site.role,
        "method": "dense" if candidate is None else method.name,
        "size": size,
        "setting": setting,
        "cost": cost,
        "dense_cost": dense,
        "error": None,
        "importance": None,
    }


def candidate_rows(region: Region, best: Chosen, losses: dict[Candidate, Rise]) -> list[Row]:
    """One for each size of each method, the refused ones after the others."""
    same = {"kind": "candidate", "region": region.name, "block": region.block}
    rows: list[Row] = [
        {
            **same,
            "method": candidate.label,
            "size": candidate.size,
            "cost": candidate.cost,
            "dense_cost": region.dense_cost,
            "loss": losses[candidate].mean,
            "loss_error": losses[candidate].error,
            "chosen": best.choice.get(region) is candidate,
            "refused": None,
        }
        for candidate in region.candidates
        if candidate in losses
    ]
    nothing = {"cost": None, "dense_cost": region.dense_cost, "loss": None, "loss_error": None, "chosen": False}
    return rows + [
        {**same, "method": label, "size": size, **nothing, "refused": reason}
        for (label, size), reason in region.refused.items()
    ]


def contender_row(chosen: Chosen | str, measured: Rise | None, tokens: int, is_best: bool) -> Row:
    name, known = (chosen, None) if isinstance(chosen, str) else (chosen.name, chosen)
    return {
        "kind": "contender",
        "contender": name,
        "cost": known and known.cost,
        "predicted": known and known.predicted,
        "bound": known and known.bound,
        "measured": measured and measured.mean,
        "measured_error": measured and measured.error,
        "tokens": tokens,
        "chosen": is_best,
    }


def split_windows(batches: Sequence[Tensor], part: float) -> tuple[list[Tensor], list[Tensor]]:  # (B, T) each
    """The windows one by one: those to fit on, and the last ones, `part` of all of them, which measure.

    Raises ValueError if there are less than two.
    """
    windows = [row for batch in batches for row in batch.split(1)]
    if len(windows) < 2:
        raise ValueError(
            f"auto fits on some windows of the calibration text and measures on others; it has {len(windows)}, and "
            "needs two at least: give calibration.num_windows, or more batches"
        )
    count = min(len(windows) - 1, max(1, ceil(part * len(windows) - 1e-9)))
    return windows[:-count], windows[-count:]
