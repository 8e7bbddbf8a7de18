"""Every kind of unit but layers by role: a matrix, a stack of experts, a block, several blocks; and which a plan has.

Shape letters: E experts, O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.compression.layers import LayersUnit
from tensormix.compression.units import Fitted, Statistics, Unit, not_finite, with_more_bits
from tensormix.methods.base import BlockMethod, HiddenStates, LinearMethod, Method, SpanMethod, StackMethod
from tensormix.operators import Cost, StandIn, stack_of
from tensormix.operators.base import computing_dtype
from tensormix.plan import Plan
from tensormix.rows import Row
from tensormix.sites import Site, blocks, find_sites, returns_of
from tensormix.sites.left_out import check_left_out
from tensormix.sites.seen import prepare_stand_in
from tensormix.statistics import Gram

_ROWS = 256  # of a weight that are in fp64 at the same time


class MatrixUnit(Unit):
    """A linear layer, or a stack of experts whose matrices are fitted one after another."""

    method: LinearMethod

    def __init__(self, model: nn.Module, method: LinearMethod, sites: Iterable[Site]) -> None:
        super().__init__(model, method, sites)
        (self.site,) = self.sites
        self.has_spectrum = method.has_spectrum

    def of_one(self) -> Any:
        """The empty operator of one expert."""
        with self.named():
            operator = self.method.empty(self.site.in_features, self.site.out_features)
        return operator.to(self.site.weight.dtype)  # floats; integers and their scales keep their size

    def empty(self) -> dict[str, nn.Module]:
        one = self.of_one()
        return {self.name: _stacked(self.site, [one, *(self.of_one() for _ in range(1, self.site.num_experts))])}

    def costs(self) -> dict[str, Cost]:
        one, site = self.of_one(), self.site
        own = 0 if one.bias is None else one.bias.numel()
        held = 0 if site.bias is None else site.bias.numel()
        added = 8 * site.weight.dtype.itemsize * max(0, site.num_experts * own - held)
        cost = Cost(site.num_experts * one.num_params, site.num_experts * one.num_bits, one.macs_per_token, 0)
        return {self.name: with_more_bits(cost._replace(macs=site.experts_per_token * cost.macs), added, site)}

    def alternatives(self) -> list[tuple[Any, Unit]]:
        sizes = self.method.allowed_sizes(self.site.in_features, self.site.out_features)
        if sizes or self.method.size is not None:
            return [(size, MatrixUnit(self.model, self.method.sized(size), self.sites)) for size in sizes]
        return super().alternatives()

    def per_expert(self, stats: Statistics) -> list[tuple[Tensor, dict[type, Any]]]:  # (O, I)
        """The weight of each expert, or of the layer, and its statistics; an idle expert gets those of all others."""
        of_experts = stats.get(self.name) or [{} for _ in range(self.site.num_experts)]
        pool_idle(of_experts)
        return [(self.site.expert_weight(expert), found) for expert, found in enumerate(of_experts)]

    def fits(self, stats: Statistics) -> Iterator[tuple[Tensor, dict[type, Any], Any, Row]]:  # (O, I)
        """The map over the experts: weight, statistics, fitted operator and facts of one after another."""
        for weight, found in self.per_expert(stats):
            operator, facts = self.method.fit_with_facts(weight, found)
            yield weight, found, operator, facts

    def fit(self, stats: Statistics, tidy: Callable[[], None] = lambda: None) -> Fitted:
        experts, squares, facts = [], [], self._tokens_per_expert(stats)
        with self.named():
            for weight, _, operator, of_expert in self.fits(stats):  # one dense expert at a time is in a wider dtype
                experts.append(operator)
                squares.append(_squares(operator.to_dense(), weight))
                if self.site.kind != "experts":
                    facts = of_expert
                    continue
                for key, value in of_expert.items():
                    facts.setdefault(key, []).append(value)
                tidy()
            facts["relative_error"] = _root_ratio(squares, experts[0])
        return Fitted({self.name: _stacked(self.site, experts)}, {self.name: facts})

    def _tokens_per_expert(self, stats: Statistics) -> Row:
        if self.site.kind != "experts" or not stats.get(self.name):
            return {}
        return {"tokens_per_expert": [next(iter(found.values())).num_tokens for found in stats[self.name]]}

    def spectra(self, stats: Statistics) -> Iterator[Tensor]:  # (K,) each
        """The singular values of each expert, by which its error at every rank is known."""
        for weight, found in self.per_expert(stats):
            values = self.method.spectrum(weight, found)
            assert values is not None, "asked only where has_spectrum is true"
            yield values

    def squared_error(self, stats: Statistics) -> float:
        """On the inputs where a Gram matrix was gathered, of the weight alone otherwise."""
        error, total, found = 0.0, 0.0, {}
        for weight, found, operator, _ in self.fits(stats):
            wide = weight.to(torch.promote_types(computing_dtype(weight), torch.float64))
            missed = wide - operator.to_dense().to(wide)
            gram = found[Gram].mean.to(wide) if Gram in found else None
            error, total = error + _energy(missed, gram), total + _energy(wide, gram)
        if not math.isfinite(error):
            raise ValueError(f"what {self.method.name} fits holds NaN or infinite values")
        if Gram in found and total == 0 and bool(self.site.weight.any()):
            raise ValueError("its calibration inputs are all zero, so no size can be told from another; leave it dense")
        return error / total if total > 0 else 0.0


class StackUnit(Unit):
    """The matrices of all experts of a stack, which share something."""

    method: StackMethod

    def empty(self) -> dict[str, nn.Module]:
        (site,) = self.sites
        with self.named():
            operator = self.method.empty(site.num_experts, site.in_features, site.out_features)
        return {self.name: operator.to(site.weight.dtype)}

    def fit(self, stats: Statistics, tidy: Callable[[], None] = lambda: None) -> Fitted:
        (site,) = self.sites
        of_experts = stats.get(self.name) or [{} for _ in range(site.num_experts)]
        with self.named():
            operator = self.method.fit(site.weight, of_experts)  # which sees how many tokens each expert got
            squares = [_squares(operator.expert_dense(e), site.expert_weight(e)) for e in range(site.num_experts)]
            return Fitted({self.name: operator}, {self.name: {"relative_error": _root_ratio(squares, operator)}})


class _Blocks(Unit):
    """Blocks are replaced whole, whatever they hold."""

    @property
    def _returns(self) -> str:
        return returns_of(self.model, self.first_block)

    @property
    def _hidden_size(self) -> int:
        config: Any = self.model.config
        return config.get_text_config().hidden_size

    def _by_name(self, made: Sequence[nn.Module]) -> dict[str, nn.Module]:
        for site, part in zip(self.sites, made, strict=True):
            prepare_stand_in(self.model, site.block or 0, part)
        return {site.name: part for site, part in zip(self.sites, made, strict=True)}

    def left_out(self) -> dict[int, StandIn]:
        """Index -> what stands in for a block, as far as its place in the model goes."""
        if not hasattr(self.model, "config"):  # there is no twin to ask
            return {}
        found = {site.block or 0: part for site, part in zip(self.sites, self.empty().values(), strict=True)}
        return {index: part.as_bypass() for index, part in found.items() if isinstance(part, StandIn)}

    def check(self, stats: Statistics) -> None:
        pass

    def check_sizes(self) -> None:
        pass


class BlockUnit(_Blocks):
    """One block."""

    method: BlockMethod
    error_left_out = 1.0

    def empty(self) -> dict[str, nn.Module]:
        hidden_size = self._hidden_size if hasattr(self.model, "config") else 0
        operator = self.method.empty(self.sites[0].module, hidden_size, returns=self._returns)
        return self._by_name([operator])

    def fit(self, stats: Statistics, tidy: Callable[[], None] = lambda: None) -> Fitted:
        operator = self.method.replace(self.sites[0].module, returns=self._returns)
        return Fitted(self._by_name([operator]), {self.name: {"relative_error": None}})


class SpanUnit(_Blocks):
    """Several consecutive blocks, from what entered and left them in the dense model."""

    method: SpanMethod

    def empty(self) -> dict[str, nn.Module]:
        made = self.method.empty([site.module for site in self.sites], self._hidden_size, returns=self._returns)
        return self._by_name(made)

    def new_statistics(self, dtype: Any) -> Statistics:
        return {}  # the hidden states are those of the pass itself

    def fit(self, stats: Statistics, tidy: Callable[[], None] = lambda: None) -> Fitted:
        states = stats[self.name][0][HiddenStates] if HiddenStates in self.kinds else HiddenStates((), (), ())
        try:
            made, found = self.method.fit([site.module for site in self.sites], states, returns=self._returns)
        except ValueError as reason:
            raise ValueError(f"{self.name} to {self.sites[-1].name}: {reason}") from None
        facts: dict[str, Row] = {site.name: {"relative_error": None} for site in self.sites}
        facts[self.name] |= found
        return Fitted(self._by_name(made), facts)


_KINDS: dict[str, Callable[..., Unit]] = {
    "matrix": MatrixUnit, "stack": StackUnit, "layers": LayersUnit, "block": BlockUnit, "span": SpanUnit,
}  # fmt: skip


def units_of(model: nn.Module, sites: Mapping[str, Site], chosen: Mapping[str, Method]) -> list[Unit]:
    """The units of a resolved plan, site name -> method, in the order of their first sites.

    Raises ValueError, naming the site, if sites cannot be fitted together.
    """
    numbers: dict[Any, set[int]] = {}  # of each method of several sites, those in which it has one
    for name, method in chosen.items():
        numbers.setdefault(_group(method), set()).add(sites[name].block or 0)
    together: dict[Any, tuple[Method, list[Site]]] = {}
    for name, method in chosen.items():
        key: Any = name
        if method.takes in ("layers", "span"):
            key = _group(method), _start(sites[name].block or 0, numbers[_group(method)], method.num_blocks)
        together.setdefault(key, (method, []))[1].append(sites[name])
    units = [_KINDS[method.takes](model, method, members) for method, members in together.values()]
    check_left_out(
        model, {n: part for unit in units if isinstance(unit, _Blocks) for n, part in unit.left_out().items()}
    )
    return units


def planned_units(model: nn.Module, plan: Plan) -> list[Unit]:
    """The units of a plan whose blocks are named. Raises ValueError if model and plan do not fit."""
    sites = find_sites(model)
    return units_of(model, {site.name: site for site in sites}, plan.resolve(sites, len(blocks(model))))


def _group(method: Method) -> Any:
    return id(method) if method.takes == "span" else method  # two rules may choose windows that touch


def _start(block: int, blocks: set[int], most: int | None) -> int:
    """The first block of those that `block` is with: a run of consecutive ones, in pieces of `most`."""
    first = block
    while first - 1 in blocks:
        first -= 1
    return first if most is None else block - (block - first) % most


def parts_of(units: Sequence[Unit], num_blocks: int) -> list[range]:
    """The blocks of a model, each alone but those that a unit needs together."""
    ends = list(range(num_blocks))  # block -> the last one that is needed with it
    for unit in units:
        ends[unit.first_block] = max(ends[unit.first_block], unit.last_block)
    parts: list[range] = []
    for block in range(num_blocks):
        if parts and block in parts[-1]:
            parts[-1] = range(parts[-1].start, max(parts[-1].stop, ends[block] + 1))
        else:
            parts.append(range(block, ends[block] + 1))
    return parts


def pool_idle(stats: list[dict[type, Any]]) -> None:
    """Give the experts that no token reached what all others saw together."""
    for kind in stats[0]:
        idle = [of_expert for of_expert in stats if of_expert[kind].num_tokens == 0]
        if idle:
            together = idle[0][kind]
            for of_expert in stats:
                if of_expert[kind].num_tokens and of_expert[kind] is not together:
                    together.merge(of_expert[kind])
            for of_expert in idle:
                of_expert[kind] = together


def _stacked(site: Site, each: list[Any]) -> Any:
    return stack_of(each) if site.kind == "experts" else each[0]


def _squares(dense: Tensor, weight: Tensor) -> tuple[float, float]:  # (O, I)
    """||W' - W||^2 and ||W||^2."""
    wanted = error = 0.0
    for ours, theirs in zip(dense.split(_ROWS), weight.split(_ROWS), strict=True):
        wanted += float(theirs.double().square().sum())
        error += float((ours.double() - theirs.double()).square().sum())
    return error, wanted


def _energy(matrix: Tensor, gram: Tensor | None) -> float:  # (O, I), (I, I)
    return float((matrix * (matrix if gram is None else matrix @ gram)).sum())


def _root_ratio(squares: list[tuple[float, float]], operator: nn.Module) -> float | None:
    error, wanted = (sum(parts) for parts in zip(*squares, strict=True))
    if not math.isfinite(error):
        raise ValueError(not_finite(operator))
    return math.sqrt(error / wanted) if wanted > 0 else None
