"""What competes for what: the regions of a model, and what every method of a list could make of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tensormix.compression import Home
from tensormix.compression.kinds import MatrixUnit, units_of
from tensormix.compression.units import Unit
from tensormix.methods import Auto
from tensormix.methods.base import Method
from tensormix.plan import Plan, Rule
from tensormix.sites import Site, blocks, find_sites


@dataclass(frozen=True, eq=False)
class Candidate:
    """One size of one method for a region. Sites of the region that the method does not know stay dense."""

    label: str  # of the method in the list
    size: Any  # the fraction of the dense cost at most, or the size itself; None of a method without sizes
    units: tuple[Unit, ...]
    cost: int

    @property
    def methods(self) -> dict[str, Method]:
        """By site."""
        return {site.name: unit.method for unit in self.units for site in unit.sites}


@dataclass(frozen=True, eq=False)
class Region:
    """The layers that one module of a block holds, or all layers of the block for methods that take it whole.

    Every region of a block takes one candidate or stays dense, unless its whole block takes one.
    """

    name: str
    block: int
    sites: tuple[Site, ...]
    is_block: bool
    dense_cost: int
    candidates: list[Candidate] = field(default_factory=list)
    refused: dict[tuple[str, Any], str] = field(default_factory=dict)  # (label, size) -> why there is none


class Regions:
    """All regions of a plan's only rule, with their candidates. Reads no weight.

    Args:
        home: says what dense weights take where they are stored.
        of: the unit of the costs, as in `Budget`.
        keep: of the budget; it is tried as a size too.

    Raises ValueError if the rule matches no site, or if nothing could be made of any region.
    """

    def __init__(self, model: nn.Module, rule: Rule, home: Home, of: str, keep: float) -> None:
        assert isinstance(rule.method, Auto)
        self.model, self.rule, self.home, self.of, self.auto = model, rule, home, of, rule.method
        self.keeps = self.auto.sizes(keep)
        self._sizes: dict[Any, list[tuple[int, Any]]] = {}
        self._all_sites = find_sites(model)
        self.regions = list(self._located())
        for region in self.regions:
            self._fill(region)
        if not any(region.candidates for region in self.regions):
            reasons = [reason for region in self.regions for reason in region.refused.values()]
            raise ValueError(reasons[0] if reasons else "auto: nothing of what it chooses from makes a layer smaller")

    @property
    def dense_cost(self) -> int:
        return sum(region.dense_cost for region in self.regions if not region.is_block)

    def _located(self) -> Iterator[Region]:
        """In the order of the model, whole blocks after what is in them."""
        num_blocks = len(blocks(self.model))
        indices = self.rule.block_indices(num_blocks)
        sites = [site for site in self._all_sites if site.block in indices and self.rule.matches(site)]
        if not sites:
            raise ValueError(f"plan[0] ({self.rule}) matches no site")
        wholes = {site.block: site for site in self._all_sites if site.kind == "block"}
        takes_blocks = any(method.takes == "block" for method in self.auto.among)
        if takes_blocks and self.rule.sites is not None:
            raise ValueError("auto: a method among those it chooses from works on whole blocks: leave out sites")
        for block in sorted(indices):
            holders: dict[str, list[Site]] = {}
            for site in sites:
                if site.block == block:
                    holders.setdefault(site.name.rpartition(".")[0], []).append(site)
            for name, held in holders.items():
                yield Region(name, block, tuple(held), False, sum(map(self.dense_cost_of, held)))
            if takes_blocks and holders:
                cost = sum(self.dense_cost_of(site) for held in holders.values() for site in held)
                yield Region(wholes[block].name, block, (wholes[block],), True, cost)

    def dense_cost_of(self, site: Site) -> int:
        """Of a layer, or of the experts of a stack, in the unit of the budget."""
        bits = self.home.dense_bits(site) if self.of in ("bits", "bytes_per_token") else 0
        return getattr(site.cost(bits), self.of)

    def _fill(self, region: Region) -> None:
        known: set[Any] = set()
        for label, method in self.auto.labels.items():
            if (method.takes == "block") != region.is_block:
                continue
            for size, methods in self._sized(method, region):
                if tuple(methods.items()) in known:
                    continue
                known.add(tuple(methods.items()))
                try:
                    candidate = self._candidate(label, size, region, methods)
                except ValueError as reason:
                    region.refused[label, size] = str(reason)
                    continue
                if candidate.cost < region.dense_cost:
                    region.candidates.append(candidate)

    def _candidate(self, label: str, size: Any, region: Region, methods: Mapping[str, Method]) -> Candidate:
        units = units_of(self.model, {site.name: site for site in region.sites}, methods)
        for unit in units:
            unit.check_sizes()
        cost = sum(getattr(cost, self.of) for unit in units for cost in unit.costs().values())
        rest = sum(self.dense_cost_of(site) for site in region.sites if site.name not in methods)
        return Candidate(label, size, tuple(units), cost + rest)

    def _sized(self, method: Method, region: Region) -> Iterator[tuple[Any, dict[str, Method]]]:
        """Every size that is tried, and the methods of the sites then."""
        sites = self._matched(method, region)
        if not sites:
            return
        if is_fixed(method):
            yield size_of(method), {site.name: method for site in sites}
        elif method.takes == "matrix":
            yield from self._of_matrices(method, sites)
        else:
            for keep in self.keeps:
                try:
                    sized = type(method).model_validate({**method.model_dump(), str(method.size): keep})
                except ValueError as reason:
                    region.refused[method.name, keep] = str(reason)
                    continue
                yield keep, {site.name: sized for site in sites}

    def _matched(self, method: Method, region: Region) -> Sequence[Site]:
        """Those of the region that the method knows."""
        rule = Rule(method=method, blocks=str(region.block), sites=None if region.is_block else self.rule.sites)
        held: dict[str, Site] = {site.name: site for site in region.sites}
        if not any(rule.matches(site) for site in region.sites):
            return ()
        try:
            chosen = Plan((rule,)).resolve(region.sites, len(blocks(self.model)))
        except ValueError:  # what it knows has no partner here
            return ()
        return [held[name] for name in chosen]

    def _of_matrices(self, method: Method, sites: Sequence[Site]) -> Iterator[tuple[Any, dict[str, Method]]]:
        """Few sizes are tried one by one; of many each site gets its largest within a fraction of its dense cost."""
        options = {site.name: self._options(method, site) for site in sites}
        sizes = list(dict.fromkeys(size for listed in options.values() for _, size in listed))
        if len(sizes) <= len(self.keeps):
            for size in sizes:
                if all(size in [other for _, other in listed] for listed in options.values()):
                    yield size, {site.name: method.sized(size) for site in sites}
            return
        for keep in self.keeps:
            chosen: dict[str, Method] = {}
            for site in sites:
                most = keep * (1 + 2**-50) * self.dense_cost_of(site)
                fitting = [size for cost, size in options[site.name] if cost <= most]
                if fitting:
                    chosen[site.name] = method.sized(fitting[-1])
            if len(chosen) == len(sites):
                yield keep, chosen

    def _options(self, method: Method, site: Site) -> list[tuple[int, Any]]:
        """Cost and size of all that a layer of this shape allows, the cheapest first."""
        own = 0 if site.bias is None else site.bias.numel()
        key = (method, site.in_features, site.out_features, site.num_experts, site.experts_per_token, own, site.kind)
        if key not in self._sizes:
            units = MatrixUnit(self.model, method, [site]).alternatives()  # type: ignore[arg-type]
            costs = [(getattr(unit.costs()[site.name], self.of), size) for size, unit in units]
            self._sizes[key] = sorted(costs, key=lambda pair: pair[0])
        return self._sizes[key]


def is_fixed(method: Method) -> bool:
    """Whether it has one size alone: it has none to decide, or says it."""
    inner = getattr(method, "of", None) or method
    return inner.size is None or getattr(inner, inner.size) != inner.largest


def size_of(method: Method) -> Any:
    inner = getattr(method, "of", None) or method
    return None if inner.size is None else getattr(inner, inner.size)
