"""The exact number of bits that a model stores, in memory and on disk.

Every tensor is counted as it is saved: integers, scales, permutations and norms too, tied weights once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tensormix.operators import bits_of
from tensormix.operators.quantized import on_meta
from tensormix.storage.checkpoint import Checkpoint


def stored_bits(stored: nn.Module | Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Bits of all parameters and persistent buffers of a model, or of all tensors of a state.

    Args:
        stored: a model, on any device (meta too), or a state dict. Tensors that share their memory count once.
        dtype: count the model as `model.to(dtype)` would store it; integers and their scales keep their size.

    Raises:
        ValueError: `dtype` is given for a state, which cannot say what may be cast.
    """
    if isinstance(stored, nn.Module):
        model = stored if dtype is None else on_meta(stored).to(dtype)
        stored = model.state_dict()
    elif dtype is not None:
        raise ValueError("stored_bits: a dtype needs the model; its state does not say which tensors may be cast")
    return bits_of(stored)


def checkpoint_bits(folder: Path) -> int:
    """Bits of all tensors in a folder of safetensors; only the headers are read, whatever the dtypes.

    After `save_pretrained` it is `stored_bits` of the model. A checkpoint that holds tied weights twice counts twice.

    Raises:
        ValueError: the folder has no safetensors, or one is damaged or cut off.
    """
    return 8 * Checkpoint(folder).num_bytes
