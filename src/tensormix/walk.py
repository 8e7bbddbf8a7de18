"""Walk the blocks once; fit each site on what the part that is compressed already really feeds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.methods.base import BlockMethod, LinearMethod, Method
from tensormix.operators import Bypass, StructuredLinear
from tensormix.plan import Plan
from tensormix.sites import Site, blocks, find_sites, install, is_dense, returns_tuple

Row = dict[str, Any]
Statistics = dict[str, dict[type, Any]]  # site name -> statistic class -> what it saw


@dataclass
class Call:
    """How the model calls one block for one batch: hidden (B, T, D) and everything that it passes beside it."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


class _Recorder(nn.Module):
    """Stands in for a block: notes how the model calls it, computes nothing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: the model must not see it
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks, e.g. attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        self.calls.append(Call(hidden_states, args, kwargs))
        return (hidden_states, None) if returns_tuple(self.__dict__["block"]) else hidden_states


@torch.no_grad()
def record_calls(model: nn.Module, batches: Iterable[Tensor]) -> list[list[Call]]:  # (B, T) each
    """Per block, per batch: how the model itself calls it.

    Masks, positions and caches differ between the blocks of one model, so one block's arguments do not serve another.
    `hidden` is what enters the first block, in all calls. Raises ValueError if a batch is not (B, T) token ids.
    """
    layers = blocks(model)
    real = list(layers)
    device = next(model.parameters()).device
    try:
        for index, block in enumerate(real):
            layers[index] = _Recorder(block)
        for batch in batches:
            if batch.dim() != 2 or batch.is_floating_point():
                shape = tuple(batch.shape)
                raise ValueError(f"a calibration batch must be token ids of shape (B, T), got {batch.dtype} {shape}")
            model(batch.to(device), use_cache=False)
        return [layer.calls for layer in layers if isinstance(layer, _Recorder)]
    finally:
        for index, block in enumerate(real):
            layers[index] = block


@contextmanager
def observe(sites: Mapping[str, Site], stats: Statistics) -> Iterator[None]:
    """While open, every statistic of `stats` is updated with the inputs (..., I) of its site."""

    def watcher(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for statistic in stats[name].values():
                statistic.update(args[0])

        return hook

    handles = [sites[name].module.register_forward_pre_hook(watcher(name)) for name in stats]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compress(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Tensor] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Replace the planned sites of `model` in place.

    Args:
        model: any decoder that keeps its blocks in a ModuleList; a transformers model can be saved with
            `save_pretrained` afterwards.
        plan: which site gets which method.
        batches: token ids (B, T) for calibration; needed, and read, only if a method needs statistics.
        progress: called after each site with the number of sites done, the number planned, and the site's name.

    Returns:
        One row per replaced site. Parameters and MACs are those of the weight (of all parameters for a block), without
        the bias; `relative_error` is ||W' - W|| / ||W|| in the Frobenius norm, None for blocks and for W = 0.

    Raises:
        ValueError: the plan does not fit the model, a method needs batches and there are none, or a weight or an
            activation is not finite. The block where that was found is unchanged, those before it are compressed.
    """
    layers = blocks(model)
    sites = {site.name: site for site in find_sites(model)}
    chosen = plan.resolve(list(sites.values()), len(layers))
    _check_sizes(sites, chosen)
    observed = [i for i in (sites[name].block for name, method in chosen.items() if method.needs) if i is not None]
    if observed and batches is None:
        needy = next(method for method in chosen.values() if method.needs)
        raise ValueError(f"{needy.name} needs calibration batches ({_names(needy.needs)}), but none were given")
    rows: list[Row] = []
    with _evaluating(model):
        calls = record_calls(model, batches or ()) if observed else []
        if observed and not (calls and calls[0]):
            raise ValueError("there are no calibration batches: the iterable is empty")
        hidden = [call.hidden for call in calls[0]] if observed else []
        for index in range(len(layers)):
            here = {name: method for name, method in chosen.items() if sites[name].block == index}
            stats = _statistics(sites, here)
            if stats:
                with observe(sites, stats):
                    _run(layers[index], calls[index], hidden)
            _check_finite(sites, here, stats)
            for name, method in here.items():
                rows.append(_replace(model, sites[name], method, stats.get(name, {})))
                if progress is not None:
                    progress(len(rows), len(chosen), name)
            if index < max(observed, default=0):
                hidden = _run(layers[index], calls[index], hidden)  # what the compressed block really passes on
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        from tensormix.hf import attach  # here, so that importing this module does not import transformers

        attach(model)
    return rows


def _run(block: nn.Module, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
    return [call.run(block, h) for call, h in zip(calls, hidden, strict=True)]


def _statistics(sites: Mapping[str, Site], chosen: Mapping[str, Method]) -> Statistics:
    return {
        name: {kind: kind(sites[name].in_features, device=sites[name].weight.device) for kind in method.needs}
        for name, method in chosen.items()
        if method.needs
    }


def _names(kinds: Iterable[type]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def _check_sizes(sites: Mapping[str, Site], chosen: Mapping[str, Method]) -> None:
    """Raise ValueError, naming the site, if a method cannot work on it: before anything is computed or changed."""
    for name, method in chosen.items():
        if isinstance(method, LinearMethod):
            try:
                method.empty(sites[name].in_features, sites[name].out_features)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _check_finite(sites: Mapping[str, Site], chosen: Mapping[str, Method], stats: Statistics) -> None:
    for name, method in chosen.items():
        if isinstance(method, LinearMethod) and not torch.isfinite(sites[name].weight).all():
            raise ValueError(f"{name}: the weight holds NaN or infinite values; nothing was changed there")
        for statistic in stats.get(name, {}).values():
            if statistic.num_tokens == 0:
                raise ValueError(f"{name}: no calibration token reached this site, so {method.name} cannot be fitted")
            if not torch.isfinite(statistic.sum).all():
                raise ValueError(f"{name}: its inputs hold NaN or infinite values; nothing was changed there")


def _replace(model: nn.Module, site: Site, method: Method, stats: dict[type, Any]) -> Row:
    start = time.perf_counter()
    operator: StructuredLinear | Bypass
    if isinstance(method, BlockMethod):
        dense, macs = sum(p.numel() for p in site.module.parameters()), _block_macs(site.module)
        operator = method.replace(site.module, returns="tuple" if returns_tuple(site.module) else "tensor")
        error = None
    elif isinstance(method, LinearMethod):
        dense = macs = site.weight.numel()
        operator = method.fit(site.weight, stats)
        try:
            error = _relative_error(operator, site.weight)
        except ValueError as reason:
            raise ValueError(f"{site.name}: {reason}") from None
    else:
        raise TypeError(f"{type(method).__name__} is neither a LinearMethod nor a BlockMethod")
    install(model, site.name, operator)
    return {
        "site": site.name,
        "block": site.block,
        "role": site.role,
        "method": method.name,
        "operator": type(operator).__name__,
        "dense_parameters": dense,
        "parameters": operator.num_params,
        "dense_macs_per_token": macs,
        "macs_per_token": operator.macs_per_token,
        "relative_error": error,
        "seconds": time.perf_counter() - start,
    }


def _relative_error(operator: StructuredLinear, weight: Tensor) -> float | None:  # (O, I)
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    wide = torch.promote_types(weight.dtype, torch.float32)  # so that bf16 does not round the difference
    error = float(torch.linalg.vector_norm(operator.to_dense().to(wide) - weight, dtype=torch.float64))
    if not math.isfinite(error):
        raise ValueError(
            f"the fitted {type(operator).__name__} holds NaN or infinite values; nothing was changed there"
        )
    return error / norm if norm > 0 else None


def _block_macs(block: nn.Module) -> int:
    dense = sum(Site("", "linear", None, None, m).weight.numel() for m in block.modules() if is_dense(m))
    return dense + sum(m.macs_per_token for m in block.modules() if isinstance(m, StructuredLinear))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode back, and a new one that of the module it replaced."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            while name not in modes:
                name = name.rpartition(".")[0]
            module.training = modes[name]
