"""The operators `tensormix::mixt`, `mixt_cores`, `mixt_siblings`: shapes, gradients of any order, a kernel per device.

They are closed under differentiation. A mixture's adjoint is the mixture of the transposed cores, so each gradient is
again one of the first two, and no dense matrix is ever formed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tensormix.kernels.mixt import cpu, reference, siblings


@torch.library.custom_op("tensormix::mixt", mutates_args=())
def mixt(x: Tensor, cores: Sequence[Tensor], bond: int, out_features: int) -> Tensor:
    """See `reference.mixt`: (N, I), K x (Q, P) -> (N, O). Features beyond I are zeros, outputs beyond O are cropped."""
    return reference.mixt(x, cores, bond, out_features).contiguous()


@torch.library.custom_op("tensormix::mixt_cores", mutates_args=())
def mixt_cores(dy: Tensor, x: Tensor, core_sizes: Sequence[int], num_branches: int, bond: int) -> Tensor:
    """See `reference.mixt_cores`: (N, O), (N, I), (Q, P) -> (K, Q, P)."""
    return reference.mixt_cores(dy, x, core_sizes, num_branches, bond)


@torch.library.custom_op("tensormix::mixt_siblings", mutates_args=())
def mixt_siblings(
    x: Tensor, cores: Sequence[Tensor], bond: int, core_bonds: Sequence[int], out_features: Sequence[int]
) -> list[Tensor]:
    """See `siblings.reference_siblings`: (N, I), K x (S C, P) -> each (N, O)."""
    return [y.contiguous() for y in siblings.reference_siblings(x, cores, bond, core_bonds, out_features)]


mixt.register_kernel("cpu")(cpu.mixt)
mixt_cores.register_kernel("cpu")(cpu.mixt_cores)


@mixt_siblings.register_kernel("cpu")
def _(
    x: Tensor, cores: Sequence[Tensor], bond: int, core_bonds: Sequence[int], out_features: Sequence[int]
) -> list[Tensor]:
    return siblings.mixt_siblings(x, cores, bond, core_bonds, out_features, cpu.mixt, siblings.MOST)


if find_spec("triton") is not None:  # not part of every PyTorch; without it a GPU takes the reference

    @mixt.register_kernel("cuda")
    def _(x: Tensor, cores: Sequence[Tensor], bond: int, out_features: int) -> Tensor:
        from tensormix.kernels.mixt import gpu  # imports Triton, which takes a while

        return gpu.mixt(x, cores, bond, out_features)

    @mixt_siblings.register_kernel("cuda")
    def _(
        x: Tensor, cores: Sequence[Tensor], bond: int, core_bonds: Sequence[int], out_features: Sequence[int]
    ) -> list[Tensor]:
        from tensormix.kernels.mixt import gpu

        return siblings.mixt_siblings(x, cores, bond, core_bonds, out_features, gpu.mixt, sys.maxsize)


@mixt.register_fake
def _(x: Tensor, cores: Sequence[Tensor], bond: int, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@mixt_cores.register_fake
def _(dy: Tensor, x: Tensor, core_sizes: Sequence[int], num_branches: int, bond: int) -> Tensor:
    return x.new_empty(num_branches, *core_sizes)


@mixt_siblings.register_fake
def _(
    x: Tensor, cores: Sequence[Tensor], bond: int, core_bonds: Sequence[int], out_features: Sequence[int]
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], O) for O in out_features]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cores, ctx.bond, _ = inputs
    ctx.save_for_backward(x, *cores)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, grads = _gradients(ctx, dy, *ctx.saved_tensors)
    return dx, grads, None, None


def _gradients(ctx: Any, dy: Tensor, x: Tensor, *cores: Tensor) -> tuple[Tensor | None, list[Tensor] | list[None]]:
    dx, grads = None, [None] * len(cores)
    if ctx.needs_input_grad[0]:
        dx = mixt(dy, [core.t() for core in cores], ctx.bond, x.shape[1])
    if any(ctx.needs_input_grad[1]):
        grads = list(mixt_cores(dy, x, cores[0].shape, len(cores), ctx.bond).unbind())
    return dx, grads


def _save_cores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, _, ctx.bond = inputs
    ctx.save_for_backward(dy, x)


def _backward_cores(ctx: Any, change: Tensor) -> tuple[Any, ...]:  # (K, Q, P)
    dy, x = ctx.saved_tensors
    to_dy = mixt(x, list(change.unbind()), ctx.bond, dy.shape[1]) if ctx.needs_input_grad[0] else None
    turned = list(change.transpose(1, 2).unbind())
    to_x = mixt(dy, turned, ctx.bond, x.shape[1]) if ctx.needs_input_grad[1] else None
    return to_dy, to_x, None, None, None


def _save_siblings(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, cores, bond, ctx.core_bonds, _ = inputs
    _save(ctx, (x, cores, bond, None), output[0])


def _backward_siblings(ctx: Any, dys: Sequence[Tensor]) -> tuple[Any, ...]:  # zeros for an output that is not used
    x, *cores = ctx.saved_tensors  # once: recomputed activations are given out only once
    outer = ctx.bond ** (len(cores) - 1)
    dx, grads = _gradients(ctx, siblings.put_together(list(dys), outer, ctx.core_bonds), x, *cores)
    return dx, grads, None, None, None


mixt.register_autograd(_backward, setup_context=_save)
mixt_cores.register_autograd(_backward_cores, setup_context=_save_cores)
mixt_siblings.register_autograd(_backward_siblings, setup_context=_save_siblings)


@register_flop_formula(torch.ops.tensormix.mixt)
def _(x: Sequence[int], cores: Sequence[Sequence[int]], bond: int, *_: Any, **__: Any) -> int:
    return 2 * x[0] * _macs(cores[0], len(cores), bond)


@register_flop_formula(torch.ops.tensormix.mixt_siblings)
def _(x: Sequence[int], cores: Sequence[Sequence[int]], bond: int, *_: Any, **__: Any) -> int:
    return 2 * x[0] * _macs(cores[0], len(cores), bond)


@register_flop_formula(torch.ops.tensormix.mixt_cores)
def _(dy: Sequence[int], x: Sequence[int], core_sizes: Sequence[int], num_branches: int, bond: int, **_: Any) -> int:
    return 2 * x[0] * _macs(core_sizes, num_branches, bond)


def _macs(core_sizes: Sequence[int], num_branches: int, bond: int) -> int:
    """For one token: arXiv 2605.25344's operator repeats each branch for every value that it passes through."""
    Q, P = core_sizes
    return num_branches * Q * P * bond ** (num_branches - 1)
