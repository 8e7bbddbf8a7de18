"""The weights of a skeleton put in and taken out one by one, memory really given back, and room on the disk."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn


def give_back() -> None:
    """Have the C library return freed pages to the system.

    glibc keeps what tensors of a few megabytes leave behind, and does not find it again for the next ones of the same
    size because they are aligned: without this a walk over many blocks grows by about a block at each of them.
    Does nothing where the C library is another one.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


def available_memory() -> int | None:
    """Bytes that the system could still give out, without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def check_space(folder: Path, needed: int) -> None:
    """Raise ValueError, with both numbers, if the disk under `folder` has less than `needed` bytes free."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{there} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed; nothing was written"
        )


def set_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer where the model has one of that name."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def empty_weights(modules: list[nn.Module]) -> None:
    """Put the weights of modules on meta, which frees them."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
