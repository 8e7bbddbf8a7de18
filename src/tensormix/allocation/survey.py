"""What each site of a plan could become: one plain pass over the dense model, before anything is replaced.

The pass is the walk of `compress` with the fitting left out: it asks a `Home` for one block at a time, so that the
model may stay in memory or come from the disk.
Shape letters: I in_features, O out_features, K singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tensormix.compression import Home, Progress, Walk
from tensormix.compression.fitting import Row, Statistics, bytes_after, check_finite, pool_idle
from tensormix.fitting.divide import Option, SiteOptions
from tensormix.methods.base import BlockMethod, LinearMethod, Method
from tensormix.operators import Cost, ExpertStack, StructuredLinear, Zero
from tensormix.operators.base import computing_dtype
from tensormix.plan import Plan
from tensormix.sites import Site, install, returns_tuple
from tensormix.sites.fused_experts import is_fused
from tensormix.statistics import Gram

Weigh = Callable[[Site, nn.Module], float]  # how much worse the model is with this operator at this site
LEAST = 1e-12  # of an importance: one that rounding left at zero or below still counts as something


@dataclass(frozen=True)
class Found:
    """What one site could become."""

    site: Site
    methods: dict[Any, Method]  # size -> the method at that size
    options: SiteOptions
    importance: float | None = None  # a measured rise divided by the relative error that made it


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
            if not isinstance(rule.method, LinearMethod | BlockMethod):
                raise ValueError(
                    f"budget: {rule.method.name} changes layers together and divides its own keep among them"
                )
        probes = [rule.model_copy(update={"method": Probe.of(rule.method, errors, with_inputs)}) for rule in plan.root]
        super().__init__(model, Plan(tuple(probes)), home, progress)
        self.of, self.errors, self.levels, self.weigh, self.keep = of, errors, levels, weigh, keep
        self.found: dict[str, Found] = {}
        self._costs: dict[Any, int] = {}
        for here in self.chosen:
            for name, method in here.items():
                inner = method.method if isinstance(method, Probe) else method
                if errors == "spectrum" and not _has_spectrum(inner):
                    raise ValueError(
                        f"{name}: the error of {inner.name} cannot be told from singular values; "
                        "divide the budget by greedy, sensitivity or uniform"
                    )

    def look(self) -> None:
        """All sites without weights: costs, and errors of zero."""
        for here in self.chosen:
            for name, method in here.items():
                self._note(name, method, [])

    def _fit(self, index: int, stats: Statistics) -> list[Row]:
        self.home.tidy()
        check_finite(self.sites, self.chosen[index], stats)
        for name, method in self.chosen[index].items():
            try:
                self._note(name, method, stats.pop(name, []))
            except ValueError as reason:
                raise ValueError(str(reason) if str(reason).startswith(name) else f"{name}: {reason}") from None
            self._count([{"site": name}])
        return []

    def _note(self, name: str, probe: Method, stats: list[dict[type, Any]]) -> None:
        site = self.sites[name]
        method = probe.method if isinstance(probe, Probe) else probe
        dense = self.home.dense_bits(site) if self.of in ("bits", "bytes_per_token") else 0
        dense_cost = getattr(site.cost(dense), self.of)
        methods = {size: m for size, m in _at_all_sizes(method, site) if self._cost(site, m) < dense_cost}
        fitted = _Fits(site, stats)
        if isinstance(method, LinearMethod) and _has_spectrum(method) and self.errors != "none":
            errors = fitted.by_spectrum(method, methods)
        elif isinstance(method, LinearMethod) and self.errors == "fits":
            methods = _thinned(methods, self.levels)
            errors = {size: fitted.error(m) for size, m in methods.items() if isinstance(m, LinearMethod)}
        else:
            errors = dict.fromkeys(methods, 1.0 if isinstance(method, BlockMethod) else 0.0)
        points = sorted((self._cost(site, m), size) for size, m in methods.items())
        options = [Option(size, cost, errors[size]) for cost, size in points]
        kept = _falling([*options, Option(None, dense_cost, 0.0)])
        importance = self._importance(site, methods, kept, fitted) if self.weigh is not None else None
        self.found[name] = Found(site, methods, SiteOptions(name, dense_cost, tuple(kept)), importance)

    def _importance(self, site: Site, methods: dict[Any, Method], options: list[Option], fitted: _Fits) -> float:
        dense = options[-1].cost
        smaller = [option for option in options if option.cost < dense and option.error > 0]
        if not smaller:
            return LEAST
        probed = min(smaller, key=lambda option: abs(option.cost - self.keep * dense))
        assert self.weigh is not None
        return max(self.weigh(site, fitted.operator(methods[probed.size])) / probed.error, LEAST)

    def _cost(self, site: Site, method: Method) -> int:
        """Whole units of what `method` leaves at the site; the same for sites of one shape, and so remembered."""
        if isinstance(method, BlockMethod):
            return 0
        assert isinstance(method, LinearMethod)
        own = 0 if site.bias is None else site.bias.numel()
        key = (method, site.in_features, site.out_features, site.num_experts, site.experts_per_token, own)
        if key not in self._costs:
            bits = 8 * (bytes_after(site, method, {}) - site.weight.dtype.itemsize * own)
            empty = method.empty(site.in_features, site.out_features)
            read = bits // 8 * site.experts_per_token // site.num_experts
            macs = site.experts_per_token * empty.macs_per_token
            cost = Cost(site.num_experts * empty.num_params, bits, macs, read)
            self._costs[key] = getattr(cost, self.of)
        return self._costs[key]


class Probe(LinearMethod):
    """Stands for a method in a survey: it needs what the survey looks at, and fits nothing."""

    source = "ours"
    summary = "Looks at a site for another method."
    needs: ClassVar[Any] = property(lambda self: self.statistics)

    name: str
    method: Any
    statistics: tuple[Any, ...] = ()

    @classmethod
    def of(cls, method: Method, errors: str, with_inputs: bool) -> Method:
        if not isinstance(method, LinearMethod):
            return method
        wanted = method.needs if errors != "none" else ()
        if errors == "fits" and with_inputs and not _has_spectrum(method):
            wanted = tuple(dict.fromkeys([*wanted, Gram]))
        return cls(name=method.name, method=method, statistics=wanted)

    def empty(self, in_features: int, out_features: int) -> StructuredLinear:
        with torch.device("meta"):
            return Zero(in_features, out_features)

    def fit(self, weight: Tensor, stats: Any) -> StructuredLinear:  # (O, I)
        raise TypeError("a probe is looked at, not fitted")


class _Fits:
    """Fits and errors at one site, of all its experts together."""

    def __init__(self, site: Site, stats: list[dict[type, Any]]) -> None:
        self.site, self.stats = site, stats or [{} for _ in range(site.num_experts)]
        pool_idle(self.stats)

    def by_spectrum(self, method: LinearMethod, methods: dict[Any, Method]) -> dict[Any, float]:
        """For each size the relative squared error of the fit of its rank."""
        tails, total = {size: 0.0 for size in methods}, 0.0
        ranks = {size: _rank(m, self.site) for size, m in methods.items()}
        for expert, stats in enumerate(self.stats):
            values = method.spectrum(self.site.expert_weight(expert), stats)
            assert values is not None
            squares = values.double().square()
            rest = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])  # (K + 1,)
            total += float(rest[0])
            for size, rank in ranks.items():
                tails[size] += float(rest[min(rank, len(squares))])
        return {size: tail / total if total > 0 else 0.0 for size, tail in tails.items()}

    def error(self, method: LinearMethod) -> float:
        """The relative squared error of a fit, on the inputs where a Gram matrix was gathered."""
        error = total = 0.0
        for expert, stats in enumerate(self.stats):
            weight = self.site.expert_weight(expert)
            wide = weight.to(torch.promote_types(computing_dtype(weight), torch.float64))
            missed = wide - method.fit(weight, stats).to_dense().to(wide)
            gram = stats[Gram].mean.to(wide) if Gram in stats else None
            error, total = error + _squares(missed, gram), total + _squares(wide, gram)
        if not isfinite(error):
            raise ValueError(f"what {method.name} fits holds NaN or infinite values")
        if Gram in self.stats[0] and total == 0 and bool(self.site.weight.any()):
            raise ValueError("its calibration inputs are all zero, so no size can be told from another; leave it dense")
        return error / total if total > 0 else 0.0

    def operator(self, method: Method) -> nn.Module:
        """What would be installed."""
        if isinstance(method, BlockMethod):
            return method.replace(self.site.module, returns="tuple" if returns_tuple(self.site.module) else "tensor")
        assert isinstance(method, LinearMethod)
        each = [method.fit(self.site.expert_weight(i), stats) for i, stats in enumerate(self.stats)]
        return ExpertStack.from_experts(each) if self.site.kind == "experts" else each[0]


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


def _has_spectrum(method: Any) -> bool:
    return isinstance(method, LinearMethod) and type(method).spectrum is not LinearMethod.spectrum


def _rank(method: Method, site: Site) -> int:
    assert isinstance(method, LinearMethod)
    return method.empty(site.in_features, site.out_features).sizes["rank"]


def _at_all_sizes(method: Method, site: Site) -> list[tuple[Any, Method]]:
    """(size, method) for every size; a method without sizes is there once, as "whole"."""
    if isinstance(method, LinearMethod):
        sizes = method.allowed_sizes(site.in_features, site.out_features)
        if sizes or method.size is not None:
            return [(size, method.sized(size)) for size in sizes]
    return [("whole", method)]


def _thinned(methods: dict[Any, Method], levels: int) -> dict[Any, Method]:
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


def _squares(matrix: Tensor, gram: Tensor | None) -> float:  # (O, I), (I, I)
    return float((matrix * (matrix if gram is None else matrix @ gram)).sum())
