"""What is timed side by side: a dense layer, MixT, and its rivals of the same shape.

`dense` is F.linear. `mixt` is N_T = 4, d = 2, padding "multiple"; `low rank` has as many parameters. `int8 dynamic` is
torch's own layer (fbgemm, float32 only), `int8 torchao` that of torchao: int8 weights, inputs quantised at each call.
`int4 torchao` is torchao's weight-only layer for a CPU, in groups of 128; its kernel is made for few tokens in bfloat16
(in float32 it took 40 times as long as dense). `mixt compiled` is torch.compile of the operator, `reference compiled`
of its meaning in plain PyTorch (`kernels/mixt/reference.py`).
"""

from __future__ import annotations

import copy
import importlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.kernels.mixt import mixt, reference
from tensormix.operators import LowRank, MixT
from tensormix.operators.base import StructuredLinear

COLD_BYTES = 640 * 2**20  # of one contestant: more than the last cache of the machines we measured on
INT4_TOKENS = 128  # up to which int4 is timed: it takes token after token
COMPILED = ("mixt compiled", "reference compiled")

Multiply = Callable[[Any, Tensor], Tensor]


class Contestant(NamedTuple):
    layers: Iterator[Any]  # the next one for ever: as many as the last cache cannot hold, or the same
    multiply: Multiply  # (layer, x) -> y
    macs: int  # of one token
    num_bytes: int  # of one layer
    trains: bool = False
    max_tokens: int | None = None

    def call(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: self.multiply(next(self.layers), x)

    def training_call(self, x: Tensor, dy: Tensor) -> Callable[[], None]:
        x = x.clone().requires_grad_()

        def call() -> None:
            layer = next(self.layers)
            parameters = [layer.requires_grad_()] if isinstance(layer, Tensor) else list(layer.parameters())
            torch.autograd.grad(self.multiply(layer, x), [x, *parameters], dy)

        return call


def filled(operator: StructuredLinear, dtype: torch.dtype) -> StructuredLinear:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.02)
    return operator.to(dtype)


def contestants(I: int, O: int, dtype: torch.dtype, *, cold: bool, compiled: bool = False) -> dict[str, Contestant]:
    def copies(make: Callable[[], Any], num_bytes: int) -> Iterator[Any]:
        return itertools.cycle([make() for _ in range(-(-COLD_BYTES // num_bytes) if cold else 1)])

    weight = torch.randn(O, I, dtype=dtype)
    small = MixT(I, O, num_branches=4)
    rank, itemsize, MACs = round(small.num_params / (I + O)), weight.element_size(), I * O
    num_bytes, macs = itemsize * small.num_params, small.macs_per_token
    cores = copies(lambda: filled(MixT(I, O, num_branches=4), dtype), num_bytes)
    found = {
        "dense": Contestant(
            copies(weight.clone, weight.nbytes), lambda w, x: F.linear(x, w), MACs, weight.nbytes, True
        ),
        "mixt": Contestant(cores, _call, macs, num_bytes, True),
    }
    if compiled:
        for name, function in zip(COMPILED, (mixt, reference.mixt), strict=True):
            found[name] = Contestant(cores, _compiled(function, O), macs, num_bytes)
        return found
    low_rank = rank * (I + O)
    layers = copies(lambda: filled(LowRank(I, O, rank=rank), dtype), itemsize * low_rank)
    found["low rank"] = Contestant(layers, _call, low_rank, itemsize * low_rank, True)
    if dtype == torch.float32:
        packed = copies(lambda: _int8_dynamic(weight), MACs)
        found["int8 dynamic"] = Contestant(packed, lambda w, x: torch.ops.quantized.linear_dynamic(x, w), MACs, MACs)
    for name, configuration, bits, tokens in _torchao(dtype):
        layer = _quantised(weight, configuration)
        num_bytes = MACs * bits // 8
        layers = copies(lambda layer=layer: copy.deepcopy(layer), num_bytes)
        found[name] = Contestant(layers, _call, MACs, num_bytes, max_tokens=tokens)
    return found


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _compiled(function: Callable[..., Tensor], out_features: int) -> Multiply:
    """Of the cores, so that all copies of a layer are one compiled function."""
    compiled = torch.compile(lambda x, cores: function(x, cores, 2, out_features), dynamic=False)
    return lambda layer, x: compiled(x, layer.cores)


def _int8_dynamic(weight: Tensor) -> Any:  # (O, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it will be replaced by torchao some day
        scales, zeros = weight.abs().amax(1) / 127, torch.zeros(len(weight), dtype=torch.long)
        return torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8), None
        )


def _torchao(dtype: torch.dtype) -> Iterator[tuple[str, Any, int, int | None]]:
    """Name, configuration, bits of a weight and most tokens of torchao's layers for this dtype, where it is there."""
    if find_spec("torchao") is None:
        return
    logging.getLogger("torchao").setLevel(logging.CRITICAL)  # its kernels for GPUs do not load on a CPU
    quantization = importlib.import_module("torchao.quantization")
    int8 = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    yield "int8 torchao", int8, 8, None
    if dtype == torch.bfloat16:
        workflow = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
        int4 = workflow.PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)
        yield "int4 torchao", int4, 4, INT4_TOKENS


def _quantised(weight: Tensor, configuration: Any) -> nn.Module:  # (O, I)
    quantize_ = importlib.import_module("torchao.quantization").quantize_
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    quantize_(holder := nn.Sequential(layer), configuration)  # it replaces modules of a model
    return holder[0]
