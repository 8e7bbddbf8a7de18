"""The operators `tensormix::grouped` and `grouped_weight`: rows sorted by group, each group times its own matrix.

They call PyTorch's grouped product where it has one, and go group by group where not, but as one operator of known
shapes: `torch.compile` and `torch.export` take it whole, whatever the dtype. They are closed under differentiation.

Shape letters: S rows, G groups, I in_features, O out_features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("tensormix::grouped", mutates_args=())
def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row s is x[s] @ weight[g] for the group g with ends[g - 1] <= s < ends[g]: (S, I), (G, I, O), (G,) -> (S, O).

    `ends` is int32 and its last entry is S. A row begins at a multiple of 16 bytes, so that the result can be the
    input of the next product.
    """
    if len(x) and multiplies(x, weight):
        y = F.grouped_mm(x, weight, offs=ends)
        return y if y.stride(0) == _pitch(y) else _like(x, weight).copy_(y)
    y, start = _like(x, weight), 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group], out=y[start:end])
        start = end
    return y


@torch.library.custom_op("tensormix::grouped_weight", mutates_args=())
def grouped_weight(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """x[rows of g].T @ dy[rows of g] for every group g: (S, I), (S, O), (G,) -> (G, I, O)."""
    dw, start = x.new_empty(len(ends), x.shape[1], dy.shape[1]), 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end].t(), dy[start:end], out=dw[group])
        else:
            dw[group].zero_()
        start = end
    return dw


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch has a grouped product of (S, I) and (G, I, O) for their dtype, strides and device."""
    if not hasattr(F, "grouped_mm") or x.dtype not in _DTYPES or x.dtype != weight.dtype:
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return x.device.type in ("cpu", "cuda") and _aligned(x) and _aligned(weight)


def _aligned(matrices: Tensor) -> bool:
    """One of the last two axes is contiguous, and the other steps by multiples of 16 bytes."""
    wide, narrow = matrices.stride()[-2:] if matrices.stride(-1) == 1 else matrices.stride()[:-3:-1]
    steps = (wide, *matrices.stride()[:-2])
    return narrow == 1 and all(step * matrices.element_size() % 16 == 0 for step in steps)


def _pitch(y: Tensor) -> int:
    """From one row of a result to the next."""
    step = max(1, 16 // y.element_size())
    return -(-y.shape[1] // step) * step


def _like(x: Tensor, weight: Tensor) -> Tensor:  # (S, O)
    S, O = x.shape[0], weight.shape[2]
    step = max(1, 16 // x.element_size())
    return x.new_empty(S, -(-O // step) * step)[:, :O]


grouped.register_fake(lambda x, weight, ends: _like(x, weight))
grouped_weight.register_fake(lambda x, dy, ends: x.new_empty(ends.shape[0], x.shape[1], dy.shape[1]))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    dx = grouped(dy, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    return dx, grouped_weight(x, dy, ends) if ctx.needs_input_grad[1] else None, None


def _backward_weight(ctx: Any, change: Tensor) -> tuple[Tensor | None, ...]:  # (G, I, O)
    x, dy, ends = ctx.saved_tensors
    dx = grouped(dy, change.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    return dx, grouped(x, change, ends) if ctx.needs_input_grad[1] else None, None


grouped.register_autograd(_backward, setup_context=_save)
grouped_weight.register_autograd(_backward_weight, setup_context=_save)


@register_flop_formula(torch.ops.tensormix.grouped)
def _(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[2]


@register_flop_formula(torch.ops.tensormix.grouped_weight)
def _(x: tuple[int, ...], dy: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * dy[1]
