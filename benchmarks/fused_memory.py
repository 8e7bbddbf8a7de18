"""Activation memory of layers that read the same input, as one product and one by one: "memory" of fused.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from contestants import filled
from torch import Tensor

from tensormix.kernels.mixt import cpu, siblings
from tensormix.operators import MixT, Siblings
from tensormix.profile import LiveBytes

Row = dict[str, Any]
Call = Callable[[], Any]
Groups = Mapping[tuple[str, str], tuple[int, tuple[int, ...]]]  # model, layers -> in_features, the out_features of each


def peak(call: Call, *alive: Tensor) -> int:
    """Bytes of tensors beside `alive` at the worst moment of the call; what the kernel allocates is seen."""
    with torch.no_grad(), LiveBytes() as mode:
        mode.known |= {tensor.untyped_storage()._cdata for tensor in alive}
        outputs = call()
    del outputs
    return mode.peak


def memory_rows(groups: Groups) -> Iterator[Row]:
    """Activation memory of a forward pass without gradients: outputs and everything that is alive beside them."""
    for (model, names), (I, out_features) in groups.items():
        layers: list[Any] = [filled(MixT(I, O, num_branches=4), torch.float32) for O in out_features]
        for tokens in (1, 128, 1024, 4096):
            used = {"dense": 4 * tokens * sum(out_features), **memory_of(layers, torch.randn(tokens, I))}
            case = {"kind": "memory", "model": model, "layers": names, "tokens": tokens}
            yield from ({**case, "layer": name, "bytes": number} for name, number in used.items())


def memory_of(layers: list[Any], x: Tensor) -> dict[str, int]:
    """Of both forms; the kernels are called past the dispatcher, which would hide what they allocate."""
    stacked = Siblings(names=[str(number) for number in range(len(layers))], parts=layers)
    sizes = 2, stacked.core_bonds, [O for O, _ in stacked.shapes.values()]

    def separate() -> list[Tensor]:
        return [cpu.mixt(x, layer.cores, 2, layer.out_features) for layer in layers]

    def together() -> list[Tensor]:
        return siblings.mixt_siblings(x, stacked.cores, *sizes, cpu.mixt, siblings.MOST)

    cores = [core for layer in layers for core in layer.cores]
    return {"separate": peak(separate, x, *cores), "together": peak(together, x, *stacked.cores)}
