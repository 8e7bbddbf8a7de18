"""Run the cores and factors of operators in small integers through torchao, an optional package.

What `rtn` stores is unpacked to floats at every call. Here the matrices that an operator multiplies with become tensors
of torchao, whose products torchao computes. This is for running only: save the model before, not after.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from tensormix.operators import LowRankStack, Quantized, StructuredLinear, outermost
from tensormix.rows import Row


@torch.no_grad()
def run_in_integers(model: nn.Module, *, bits: Literal[4, 8] = 8, group: int = 32) -> list[Row]:
    """Every operator of `model` that can runs with integer matrices afterwards; dense layers are left alone.

    Rounded is as torchao rounds: 8 bits with a scale per row, 4 bits with one per `group` neighbours, or per row where
    the group does not divide it. What `rtn` has rounded becomes floats first, and is rounded anew. Nothing trains
    afterwards. An operator that multiplies in a way that torchao does not know stays as it is: MixT, whose product is
    one operation of our own.

    Returns:
        One row for each operator: "site", "operator", "bits" (None where it stays), the "relative_error" of its
        outputs on random inputs, and the "reason" why it stays.

    Raises:
        ValueError: torchao is not installed, `bits` is neither 4 nor 8, or the model has no operator.
    """
    if bits not in (4, 8):
        raise ValueError(f"run_in_integers: bits must be 4 or 8, got {bits!r}")
    _torchao()
    # torchao knows matrices, so what lies in one tensor for all experts is taken apart.
    for name, stack in list(outermost(model, LowRankStack)):
        model.set_submodule(name, stack.one_by_one())
    names = [name for name, _ in outermost(model, StructuredLinear)]
    if not names:
        raise ValueError("run_in_integers: the model has no operators; compress it first")
    return [_replace(model, name, bits, group) for name in names]


def _replace(model: nn.Module, name: str, bits: int, group: int) -> Row:
    operator = model.get_submodule(name)
    assert isinstance(operator, StructuredLinear)
    row: Row = {"site": name, "operator": type(operator).__name__, "bits": None, "relative_error": None, "reason": None}
    if isinstance(operator, Quantized):
        operator = operator.dequantized()
    dtype = next((p.dtype for p in operator.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, operator.in_features, generator=generator).to(operator.weight.device, dtype)
    expected = operator(x)
    owners = [(part, leaf, p) for part in operator.modules() for leaf, p in part.named_parameters(recurse=False)]
    matrices = [(part, leaf, p) for part, leaf, p in owners if leaf != "bias" and p.dim() == 2 and p.numel()]
    try:
        for part, leaf, parameter in matrices:
            part.register_parameter(leaf, _integers(parameter, bits, group))
        got = operator(x)
    except (NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
        for part, leaf, parameter in matrices:
            part.register_parameter(leaf, parameter)
        return {**row, "reason": " ".join(str(error).split())[:200] or type(error).__name__}
    if not matrices:
        return {**row, "reason": f"a {type(operator).__name__} multiplies with no matrix that is stored as such"}
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, operator)
    error = float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return {**row, "operator": type(operator).__name__, "bits": bits, "relative_error": error}


def _integers(matrix: nn.Parameter, bits: int, group: int) -> nn.Parameter:  # (M, K)
    """The same matrix as a tensor of torchao."""
    torchao = _torchao()
    rows, columns = matrix.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(matrix.detach().clone(), requires_grad=False)
    if bits == 8:
        config = torchao.Int8WeightOnlyConfig()
    else:
        fits = columns % group == 0
        granularity = torchao.PerGroup(group) if fits else torchao.PerAxis(0)
        config = torchao.IntxWeightOnlyConfig(torch.int4, granularity)  # pyright: ignore[reportAttributeAccessIssue]
    torchao.quantize_(layer, config)
    return nn.Parameter(layer.weight, requires_grad=False)


def _torchao() -> Any:
    """The part of torchao that rounds, which is imported here and nowhere else."""
    try:
        return import_module("torchao.quantization")
    except ImportError as error:
        raise ValueError(
            f"running in integers needs torchao, which cannot be imported here ({error}): "
            "pip install 'tensormix[torchao]'. Storage in integers (rtn) does not need it."
        ) from None
