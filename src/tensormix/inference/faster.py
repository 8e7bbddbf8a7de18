"""Dense where dense is faster, for as long as it is wanted: small layers, and layers that unpack at every call."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.clock import seconds_of
from tensormix.operators import Dense, StructuredLinear, outermost
from tensormix.rows import Row


@contextmanager
@torch.no_grad()
def dense_where_faster(model: nn.Module, *, num_tokens: int, repeats: int = 15) -> Iterator[list[Row]]:
    """Inside, each structured layer that is slower than its dense form at `num_tokens` tokens is dense.

    Both forms of every kind of layer are timed first, on this machine, in turns. Dense layers take the memory that
    compression saved: `extra_bytes` of a row says how much. On leaving, the model is as it was; what was trained or
    loaded inside is lost.

    Yields:
        One row per structured layer: module, operator, tokens, structured_ms, dense_ms (medians of `repeats`),
        chosen ("structured" or "dense"), extra_bytes.

    Raises:
        ValueError: `num_tokens` or `repeats` is less than 1.
    """
    for name, value in (("num_tokens", num_tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"dense_where_faster: {name} must be at least 1, got {value}")
    replaced: list[tuple[nn.Module, str, StructuredLinear]] = []
    known: dict[str, tuple[float, float]] = {}  # one measurement for all layers of a kind
    rows: list[Row] = []
    try:
        for name, operator in structured_layers(model):
            dense = _dense(operator)
            x = dense.matrix.new_ones(num_tokens, operator.in_features)
            kind = f"{json.dumps(operator.spec)} {x.dtype} {x.device}"
            if kind not in known:
                known[kind] = milliseconds(operator, dense, x, repeats)
            ours, theirs = known[kind]
            rows.append(
                {
                    "module": name,
                    "operator": type(operator).__name__,
                    "tokens": num_tokens,
                    "structured_ms": ours,
                    "dense_ms": theirs,
                    "chosen": "dense" if theirs < ours else "structured",
                    "extra_bytes": dense.matrix.nbytes if theirs < ours else 0,
                }
            )
            if theirs < ours:
                parent, _, child = name.rpartition(".")
                replaced.append((model.get_submodule(parent), child, operator))
                setattr(model.get_submodule(parent), child, dense)
        yield rows
    finally:
        for parent, child, operator in replaced:
            setattr(parent, child, operator)


def structured_layers(model: nn.Module) -> list[tuple[str, StructuredLinear]]:
    """Every structured layer that is not part of another one and is not dense anyhow."""
    return [(name, part) for name, part in outermost(model, StructuredLinear) if name and not isinstance(part, Dense)]


def _dense(operator: StructuredLinear) -> Dense:
    """Its dense form, with its very bias; inside `without_zeros` that of the neurons which stay, the first ones."""
    dense = Dense.from_dense(operator.to_dense().detach()).train(operator.training).requires_grad_(False)
    dense.bias = bias = operator.bias
    if bias is not None and len(bias) > operator.out_features:
        dense.bias = nn.Parameter(bias.detach()[: operator.out_features], requires_grad=False)
    return dense


def milliseconds(
    one: Callable[[Tensor], Any], other: Callable[[Tensor], Any], x: Tensor, repeats: int
) -> tuple[float, float]:
    """Medians of `repeats` calls of each with x, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 2):
        for module, seconds in zip((one, other), times, strict=True):
            took = seconds_of(lambda m=module: m(x), x.device)
            if number >= 2:  # the first two only warm up
                seconds.append(took)
    ours, theirs = (1000 * statistics.median(seconds) for seconds in times)
    return ours, theirs
