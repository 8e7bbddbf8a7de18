"""Slice the residual stream of a whole model: measure a basis before every half block, then put them into the weights.

Shape letters: B sequences, T tokens, D hidden size, S width of the sliced stream, O out_features, I in_features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.methods.base import ModelMethod
from tensormix.operators import SlicedBlock
from tensormix.operators.base import computing_dtype
from tensormix.reparameterise.residual import read, write
from tensormix.rows import Row
from tensormix.sites import locate_blocks, macs_per_token
from tensormix.sites.calls import Call
from tensormix.sites.families import family_of
from tensormix.sites.sliced import block_layers, check_sliceable, ends, final_norm, run_attention, run_mlp, shrink
from tensormix.sites.through import Blocks, through


@torch.no_grad()
def slice_model(
    model: nn.Module,
    method: ModelMethod,
    batches: Iterable[Tensor] | None,  # (B, T) each
    progress: Callable[[int, int, str], None],
    *,
    propagated: bool,
    precision: torch.dtype,
) -> list[Row]:
    """Slice `model` in place; one row per block, one for the embedding and one for the head.

    All of the model and the bases of all blocks are in memory at once. The model is changed at the end, or not at all.

    Raises:
        ValueError: the model is of another kind, there are no batches, or the stream is zero or not finite somewhere.
    """
    width = method.width(check_sliceable(model))
    if batches is None:
        needs = ", ".join(kind.__name__ for kind in method.needs)
        raise ValueError(f"{method.name} needs calibration batches ({needs}), but none were given")
    start = time.perf_counter()
    before = list(_costs(model))
    bases = _bases(model, method, batches, propagated, precision, progress)
    weights = _turned(model, bases)
    shrink(model, width)
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    return _rows(method, before, model, time.perf_counter() - start)


def slice_empty(model: nn.Module, method: ModelMethod) -> list[Row]:
    """The same for a skeleton on meta, without any numbers: for sizes and costs."""
    before = list(_costs(model))
    shrink(model, method.width(check_sliceable(model)))
    return _rows(method, before, model, 0.0)


def _bases(
    model: nn.Module,
    method: ModelMethod,
    batches: Iterable[Tensor],
    propagated: bool,
    precision: torch.dtype,
    progress: Callable[[int, int, str], None],
) -> list[Tensor]:  # (D, S) each
    """Of the stream before each attention and each MLP, in the order of the model, and before the final norm."""
    root, layers = locate_blocks(model)
    bases, hidden = [], []
    for part in through(model, Blocks(), batches):
        index, hidden = part.span[0], part.hidden["dense"]
        for half, place in ((run_attention, "attention"), (run_mlp, "MLP")):
            bases.append(_basis(hidden, method, precision, f"{root}.{index}, before its {place}"))
            part.pass_on("dense", partial(_half, half, layers[index], bases[-1] if propagated else None))
        progress(index + 1, len(layers), f"{root}.{index}")
    return [*bases, _basis(hidden, method, precision, "the final norm")]


def _half(run: Callable[..., Tensor], block: Any, basis: Tensor | None, call: Call, hidden: Tensor) -> Tensor:
    return run(block, call, hidden if basis is None else _projected(hidden, basis))


def _basis(hidden: list[Tensor], method: ModelMethod, precision: torch.dtype, place: str) -> Tensor:  # -> (D, S)
    stats = {kind: kind(hidden[0].shape[-1], hidden[0].device, precision) for kind in method.needs}
    for statistic in stats.values():
        for states in hidden:  # (B, T, D)
            statistic.update(states)
    try:
        return method.basis(stats, method.width(hidden[0].shape[-1])).to(computing_dtype(hidden[0]))
    except ValueError as reason:
        raise ValueError(f"{place}: {reason}; nothing was changed") from None


def _projected(hidden: Tensor, basis: Tensor) -> Tensor:  # (B, T, D), (D, S) -> (B, T, D)
    return (hidden.to(basis) @ basis @ basis.T).to(hidden)


def _turned(model: nn.Module, bases: list[Tensor]) -> dict[str, Tensor]:
    """Every new weight by its name in the sliced model, in the dtype of the old one."""
    root, layers = locate_blocks(model)
    found: dict[str, Tensor] = {}
    for index, block in enumerate(layers):
        places = bases[2 * index : 2 * index + 3]
        for half, (inputs, outputs) in enumerate(pairwise(places)):
            norm, part = family_of(block).halves[half]
            shortcut = ("attention_shortcut", "mlp_shortcut")[half]
            scale = block.get_submodule(norm).get_parameter("weight")
            for name, (layer, reads) in block_layers(block).items():
                if not name.startswith(f"{part}."):
                    continue
                full = f"{root}.{index}.{name}"
                found[f"{full}.weight"] = (
                    read(layer.weight, scale, inputs) if reads else write(layer.weight, outputs)
                ).to(layer.weight)
                if layer.bias is not None:
                    found[f"{full}.bias"] = layer.bias if reads else write(layer.bias, outputs).to(layer.bias)
            found[f"{root}.{index}.{shortcut}.weight"] = (outputs.T @ inputs).to(scale.dtype)
    names = {module: name for name, module in model.named_modules()}
    embedding, head = ends(model)
    scale = final_norm(model).get_parameter("weight")
    found[f"{names[embedding]}.weight"] = (embedding.weight.to(bases[0]) @ bases[0]).to(embedding.weight)
    found[f"{names[head]}.weight"] = read(head.weight, scale, bases[-1]).to(head.weight)
    if head.bias is not None:
        found[f"{names[head]}.bias"] = head.bias
    return found


def _costs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What every block, the embedding and the head hold; a tied head holds nothing of its own."""
    root, layers = locate_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    embedding, head = ends(model)
    tied = embedding.weight is head.weight
    parts: list[tuple[str, int | None, nn.Module]] = [(f"{root}.{i}", i, block) for i, block in enumerate(layers)]
    for name, index, module in [*parts, (names[embedding], None, embedding), (names[head], None, head)]:
        state = {} if module is head and tied else module.state_dict()
        yield {
            "site": name,
            "block": index,
            "operator": type(module).__name__,
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "bits": sum(8 * tensor.numel() * tensor.element_size() for tensor in state.values()),
            "macs_per_token": macs_per_token(module),
        }


def _rows(method: ModelMethod, before: list[dict[str, Any]], model: nn.Module, seconds: float) -> list[Row]:
    rows = []
    for old, new in zip(before, _costs(model), strict=True):
        dense = {f"dense_{key}": old[key] for key in ("parameters", "bits", "macs_per_token")}
        facts = {"role": None, "method": method.name, "relative_error": None, "seconds": 0.0 if rows else seconds}
        rows.append({**new, **dense, **facts})
    assert all(row["operator"] == SlicedBlock.__name__ for row in rows[:-2])
    return rows
