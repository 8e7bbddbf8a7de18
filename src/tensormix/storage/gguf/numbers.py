"""The numbers that a tensor of a GGUF file stands for, whatever its type: by the package gguf, a piece at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensormix.storage.entries import NAMES, Entry
from tensormix.storage.gguf.header import Stored, library

PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}  # types of ggml that are numbers
_PIECE = 1 << 20  # numbers that are taken out of their codes at once


def type_name(kind: int) -> str:
    """As ggml calls it."""
    return library().GGMLQuantizationType(kind).name


@cache
def is_readable(kind: int) -> bool:
    """Whether numbers can be made of a type: one block of zeros is tried."""
    if kind in PLAIN:
        return True
    size = library().GGML_QUANT_SIZES[kind][1]
    try:
        _decoded(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def values_of(tensor: Stored) -> Tensor:
    """All numbers of a tensor in its shape: mapped where they are plain, else made in float32."""
    if tensor.type in PLAIN:
        dtype = NAMES[PLAIN[tensor.type]]
        return Entry(tensor.name, tensor.file, dtype, tensor.shape, tensor.start, tensor.stop).read()
    per_block, size = library().GGML_QUANT_SIZES[tensor.type]
    num_blocks = (tensor.stop - tensor.start) // size
    codes = np.memmap(tensor.file, np.uint8, "r", tensor.start, (num_blocks, size))
    out = torch.empty(num_blocks * per_block)
    step = max(_PIECE // per_block, 1)
    for first in range(0, num_blocks, step):
        piece = _decoded(np.asarray(codes[first : first + step]), tensor.type)
        out[first * per_block : first * per_block + piece.size] = torch.from_numpy(piece.reshape(-1))
    return out.view(tensor.shape)


def _decoded(codes: Any, kind: int) -> Any:  # (blocks, bytes) -> (blocks, numbers), float32
    if type_name(kind) == "Q1_0":  # a sign a number and one scale a block; the package knows its size only
        scale = codes[:, :2].copy().view(np.float16).astype(np.float32)
        bits = np.unpackbits(codes[:, 2:], axis=1, bitorder="little")
        return np.where(bits, scale, -scale)
    with np.errstate(all="ignore"):
        return library().quants.dequantize(codes, library().GGMLQuantizationType(kind))
