"""What each site of a plan could become: one plain pass over the dense model, before anything is replaced.

The pass is the walk of `compress` with the fitting left out: it asks a `Home` for one block at a time, so that the
model may stay in memory or come from the disk.
Shape letters: K singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tensormix.allocation.rises import Rise
from tensormix.compression import Home, Progress, Walk
from tensormix.compression.units import Statistics, Unit
from tensormix.fitting.divide import Option, SiteOptions
from tensormix.methods.base import Method
from tensormix.plan import Plan
from tensormix.rows import Row
from tensormix.sites import Site, install
from tensormix.sites.fused_experts import is_fused
from tensormix.statistics import Gram

Weigh = Callable[[Site, nn.Module], Rise]  # how much worse the model is with this operator at this site
LEAST = 1e-12  # of an importance: one that rounding left at zero or below still counts as something


@dataclass(frozen=True)
class Found:
    """What one site could become."""

    site: Site
    methods: dict[Any, Method]  # size -> the method at that size
    options: SiteOptions
    importance: float | None = None  # a measured rise divided by the relative error that made it
    importance_error: float | None = None  # one standard error of that, over the tokens


class Survey(Walk):
    """Asks every site of a plan what its method could make of it; `found` has the answers after `run`.

    Args:
        of: the unit of the costs, as in `Budget`.
        errors: "none" (all zero, no weight is read), "spectrum" (from singular values) or "fits" (of `levels` sizes).
            Both are relative: divided by the error of a weight of zero.
        with_inputs: fits are measured on the calibration inputs, not on the weight alone.
        weigh: measures how much a site matters, at the size that keeps about `keep` of it.

    Raises:
        ValueError: as `Walk`, and if errors by spectrum are asked of a method that has none.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        home: Home,
        progress: Progress | None = None,
        *,
        of: str,
        errors: Literal["none", "spectrum", "fits"],
        levels: int = 12,
        with_inputs: bool = False,
        weigh: Weigh | None = None,
        keep: float = 1.0,
    ) -> None:
        for rule in plan.root:
            if rule.method.takes not in ("matrix", "stack", "block"):
                raise ValueError(
                    f"budget: {rule.method.name} changes layers together and divides its own keep among them"
                )
        super().__init__(model, plan, home, progress)
        self.of, self.errors, self.levels, self.weigh, self.keep = of, errors, levels, weigh, keep
        self.found: dict[str, Found] = {}
        self._costs: dict[Any, int] = {}
        for unit in self.units:
            if errors == "spectrum" and not unit.has_spectrum:
                raise ValueError(
                    f"{unit.name}: the error of {unit.method.name} cannot be told from singular values; "
                    "divide the budget by greedy, sensitivity or uniform"
                )
            if errors == "none":
                unit.kinds = ()
            elif errors == "fits" and with_inputs and not unit.has_spectrum and unit.method.takes != "block":
                unit.kinds = tuple(dict.fromkeys([*unit.kinds, Gram]))

    def check_sizes(self) -> None:
        pass  # those of the plan stand for "not decided yet"

    def look(self) -> None:
        """All sites without weights: costs, and errors of zero."""
        for unit in self.units:
            self._note(unit, {})

    def _fit(self, part: range, stats: Statistics) -> list[Row]:
        self.home.tidy()
        units = self.units_in(part)
        for unit in units:
            unit.check(stats)
        for unit in units:
            try:
                self._note(unit, {name: stats.pop(name) for name in unit.needs()})
            except ValueError as reason:
                named = str(reason).startswith(unit.name)
                raise ValueError(str(reason) if named else f"{unit.name}: {reason}") from None
            self._count([{"site": unit.name}])
        return []

    def _note(self, unit: Unit, stats: Statistics) -> None:
        (site,) = unit.sites
        dense = self.home.dense_bits(site) if self.of in ("bits", "bytes_per_token") else 0
        dense_cost = getattr(site.cost(dense), self.of)
        units = {size: sized for size, sized in unit.alternatives() if self._cost(sized, site) < dense_cost}
        if unit.has_spectrum and self.errors != "none":
            errors = _by_spectrum(unit, units, stats)
        elif self.errors == "fits":
            units = _thinned(units, self.levels)
            errors = {size: sized.squared_error(stats) for size, sized in units.items()}
        else:
            errors = {size: sized.error_left_out for size, sized in units.items()}
        points = sorted((self._cost(sized, site), size) for size, sized in units.items())
        options = [Option(size, cost, errors[size]) for cost, size in points]
        kept = _falling([*options, Option(None, dense_cost, 0.0)])
        rise = self._rise(site, units, kept, stats) if self.weigh is not None else (None, None)
        methods = {size: sized.method for size, sized in units.items()}
        self.found[unit.name] = Found(site, methods, SiteOptions(unit.name, dense_cost, tuple(kept)), *rise)

    def _rise(
        self, site: Site, units: dict[Any, Unit], options: list[Option], stats: Statistics
    ) -> tuple[float, float]:
        """The importance of a site and its standard error."""
        dense = options[-1].cost
        smaller = [option for option in options if option.cost < dense and option.error > 0]
        if not smaller:
            return LEAST, 0.0
        probed = min(smaller, key=lambda option: abs(option.cost - self.keep * dense))
        assert self.weigh is not None
        operator = units[probed.size].fit(stats).operators[site.name]
        rise = self.weigh(site, operator)
        return max(rise.mean / probed.error, LEAST), rise.error / probed.error

    def _cost(self, unit: Unit, site: Site) -> int:
        """Whole units of what is left at the site; the same for sites of one shape, and so remembered."""
        if site.kind == "block":
            return getattr(unit.costs()[site.name], self.of)
        own = 0 if site.bias is None else site.bias.numel()
        key = (unit.method, site.in_features, site.out_features, site.num_experts, site.experts_per_token, own)
        if key not in self._costs:
            self._costs[key] = getattr(unit.costs()[site.name], self.of)
        return self._costs[key]


def _by_spectrum(unit: Any, units: dict[Any, Any], stats: Statistics) -> dict[Any, float]:
    """For each size the relative squared error of the fit of its rank, of all experts together."""
    tails, total = {size: 0.0 for size in units}, 0.0
    ranks = {size: sized.of_one().sizes["rank"] for size, sized in units.items()}
    for values in unit.spectra(stats):
        squares = values.double().square()
        rest = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])  # (K + 1,)
        total += float(rest[0])
        for size, rank in ranks.items():
            tails[size] += float(rest[min(rank, len(squares))])
    return {size: tail / total if total > 0 else 0.0 for size, tail in tails.items()}


@contextmanager
def in_place(model: nn.Module, site: Site, operator: nn.Module) -> Iterator[None]:
    """While open, `operator` stands at the site; afterwards the model is as it was."""
    parent, _, child = site.name.rpartition(".")
    holder = model.get_submodule(parent)
    old = None if is_fused(holder) else holder.get_submodule(child)
    try:
        install(model, site.name, operator)
        yield
    finally:
        if old is None:
            model.set_submodule(parent, holder)  # the fused experts, which installing had opened
        else:
            setattr(holder, child, old)


def _thinned(methods: dict[Any, Unit], levels: int) -> dict[Any, Unit]:
    """At most `levels` of them, evenly spread, the first and the last among them."""
    sizes = list(methods)
    if len(sizes) <= levels:
        return methods
    places = sorted({round(i * (len(sizes) - 1) / max(levels - 1, 1)) for i in range(levels)})
    return {sizes[place]: methods[sizes[place]] for place in places}


def _falling(options: Sequence[Option]) -> list[Option]:
    """Without those that cost more than another and are no better, unless all errors are equal."""
    flat = len({option.error for option in options[:-1]}) <= 1
    kept: list[Option] = []
    for option in options:
        if kept and option.cost == kept[-1].cost:
            if option.error < kept[-1].error:
                kept[-1] = option
        elif not kept or option.error < kept[-1].error or flat or option is options[-1]:
            kept.append(option)
    return kept
