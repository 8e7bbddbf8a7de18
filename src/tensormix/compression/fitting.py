"""One site: watch its inputs, fit an operator to its weight, and say in a row what came of it.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.compression.units import Group
from tensormix.methods.base import BlockMethod, LinearMethod, Method
from tensormix.operators import Cost, ExpertStack, StructuredLinear
from tensormix.sites import Site, cost_of, install, opened, returns_tuple
from tensormix.statistics import is_finite

Row = dict[str, Any]
_ROWS = 256  # of a weight that are in fp64 at the same time
Statistics = dict[str, list[dict[type, Any]]]  # site name -> of each expert: statistic class -> what it saw


def new_statistics(
    sites: Mapping[str, Site], chosen: Mapping[str, Method], dtype: torch.dtype, groups: Iterable[Group] = ()
) -> Statistics:
    """Empty ones for every site whose method needs some: one for a linear layer, one for each expert of a stack.

    `groups` are those of the sites that are fitted together, which need some at a part of their sites only.
    """

    def empty(site: Site, kinds: tuple[type, ...]) -> dict[type, Any]:
        return {kind: kind(site.in_features, site.weight.device, dtype) for kind in kinds}

    needs = {name: method.needs for name, method in chosen.items() if method.site != "joint" and method.needs}
    for group in groups:
        needs |= group.needs()
    return {name: [empty(sites[name], needs[name]) for _ in range(sites[name].num_experts)] for name in needs}


@contextmanager
def observe(model: nn.Module, sites: Mapping[str, Site], stats: Statistics) -> Iterator[None]:
    """While open, every statistic of `stats` is updated with the inputs (..., I) of its site, or of its expert."""

    def watcher(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:  # (x,) of a linear layer, (x, expert) of a stack
            for statistic in stats[name][args[1] if len(args) > 1 else 0].values():
                statistic.update(args[0])

        return hook

    with opened(model, [sites[name] for name in stats]) as modules:
        handles = [modules[name].register_forward_pre_hook(watcher(name)) for name in stats]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_finite(sites: Mapping[str, Site], chosen: Mapping[str, Method], stats: Statistics) -> None:
    """Raise ValueError, naming the site, if a weight or an input is not finite or a statistic saw no token."""
    for name, method in chosen.items():
        if method.site != "block" and not is_finite(sites[name].weight):
            raise ValueError(f"{name}: the weight holds NaN or infinite values; nothing was changed there")
        for kind in stats[name][0] if name in stats else ():
            seen = [of_expert[kind] for of_expert in stats[name]]
            if not any(statistic.num_tokens for statistic in seen):
                raise ValueError(f"{name}: no calibration token reached this site, so {method.name} cannot be fitted")
            if not all(statistic.is_finite for statistic in seen):
                raise ValueError(f"{name}: its inputs hold NaN or infinite values; nothing was changed there")


def replace(
    model: nn.Module,
    site: Site,
    method: Method,
    stats: list[dict[type, Any]],
    dense_bits: int,
    tidy: Callable[[], None] = lambda: None,
) -> Row:
    """Fit `method` to the site, put the operator there, and return the row about it.

    Args:
        stats: of the site, or of each expert. An expert that no token reached gets those of all others together.
        dense_bits: what the dense weight takes where it is stored.
        tidy: called after each expert, when what its fit computed with was let go of.

    Raises ValueError, naming the site, if the method cannot be fitted there or the fit is not finite.
    """
    start = time.perf_counter()
    error, facts, dense = None, {}, site.cost(dense_bits)
    if isinstance(method, BlockMethod):
        operator = method.replace(site.module, returns="tuple" if returns_tuple(site.module) else "tensor")
    elif isinstance(method, LinearMethod):
        try:
            operator, error, facts = _fit(site, method, stats, tidy)
        except ValueError as reason:
            raise ValueError(f"{site.name}: {reason}") from None
    else:
        raise TypeError(f"{type(method).__name__} is neither a LinearMethod nor a BlockMethod")
    install(model, site.name, operator)
    facts |= {"relative_error": error, "seconds": time.perf_counter() - start}
    return _row(site, method, operator, dense, facts)


def replace_together(
    model: nn.Module, group: Group, stats: Statistics, dense_bits: Callable[[Site], int], tidy: Callable[[], None]
) -> list[Row]:
    """Fit a joint method to its sites and put all operators there: all of them, or none if one cannot be fitted.

    The first of the rows has the seconds of all. Relative errors are None, because the operators may hold the same
    neurons and channels in another order. `tidy` is called when the statistics are no longer needed.
    """
    start = time.perf_counter()
    needed = {name: stats.pop(name) for name in group.needs()}
    operators = group.fit(needed)
    needed.clear()
    tidy()
    for name, operator in operators.items():
        if not all(is_finite(tensor) for tensor in operator.state_dict().values()):
            raise ValueError(f"{name}: {_not_finite(operator)}")
    rows = []
    for site in group.sites:
        operator, dense = operators[site.name], site.cost(dense_bits(site))
        install(model, site.name, operator, move_bias=False)
        facts = {"relative_error": None, "seconds": 0.0 if rows else time.perf_counter() - start}
        rows.append(_row(site, group.method, operator, dense, facts))
    return rows


def _row(site: Site, method: Method, operator: Any, dense: Cost, facts: Row) -> Row:
    """What there is to say about a site; `dense` is what it cost before."""
    cost = cost_of(operator, site.experts_per_token)
    return {
        "site": site.name,
        "block": site.block,
        "role": site.role,
        "method": method.name,
        "operator": type(operator).__name__,
        "dense_parameters": dense.parameters,
        "parameters": cost.parameters,
        "dense_bits": dense.bits,
        "bits": cost.bits,
        "dense_macs_per_token": dense.macs,
        "macs_per_token": cost.macs,
        **facts,
    }


def _fit(
    site: Site, method: LinearMethod, stats: list[dict[type, Any]], tidy: Callable[[], None]
) -> tuple[StructuredLinear | ExpertStack, float | None, Row]:
    """The operator, its relative error, and what else there is to say."""
    if site.kind != "experts":
        operator, facts = method.fit_with_facts(site.weight, stats[0] if stats else {})
        return operator, _root_ratio([_squares(operator, site.weight)], operator), facts
    facts: Row = {}
    if stats:
        facts["tokens_per_expert"] = [next(iter(of_expert.values())).num_tokens for of_expert in stats]
        pool_idle(stats)
    experts, squares = [], []
    for expert in range(site.num_experts):  # one dense expert at a time is all that is ever in a wider dtype
        weight = site.expert_weight(expert)
        operator, of_expert = method.fit_with_facts(weight, stats[expert] if stats else {})
        experts.append(operator)
        for key, value in of_expert.items():
            facts.setdefault(key, []).append(value)
        squares.append(_squares(experts[-1], weight))
        tidy()
    return ExpertStack.from_experts(experts), _root_ratio(squares, experts[0]), facts


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


def _squares(operator: StructuredLinear, weight: Tensor) -> tuple[float, float]:  # (O, I)
    """||W' - W||^2 and ||W||^2."""
    wanted = error = 0.0
    for ours, theirs in zip(operator.to_dense().split(_ROWS), weight.split(_ROWS), strict=True):
        wanted += float(theirs.double().square().sum())
        error += float((ours.double() - theirs.double()).square().sum())
    return error, wanted


def _root_ratio(squares: list[tuple[float, float]], operator: StructuredLinear) -> float | None:
    error, wanted = (sum(parts) for parts in zip(*squares, strict=True))
    if not math.isfinite(error):
        raise ValueError(_not_finite(operator))
    return math.sqrt(error / wanted) if wanted > 0 else None


def _not_finite(operator: nn.Module) -> str:
    return f"the fitted {type(operator).__name__} holds NaN or infinite values; nothing was changed there"


def bytes_after(site: Site, method: Method | None, operators: Mapping[str, StructuredLinear]) -> int:
    """What the site takes in the new checkpoint: its operator, or the dense stack beside one, and the bias.

    `operators` has the empty ones of the sites that are fitted together.
    """
    if isinstance(method, BlockMethod):
        return cost_of(method.replace(site.module)).bits // 8
    size, bias = site.weight.dtype.itemsize, 0 if site.bias is None else site.bias.numel()
    if method is None:
        return size * (site.weight.numel() + bias)
    # Floats come in the dtype of the weight; integers and their scales keep their size.
    if isinstance(method, LinearMethod):
        operator = method.empty(site.in_features, site.out_features).to(site.weight.dtype)
    else:
        operator = operators[site.name].to(site.weight.dtype)
    own = 0 if operator.bias is None else operator.bias.numel()
    return site.num_experts * operator.num_bits // 8 + size * max(bias, site.num_experts * own)
