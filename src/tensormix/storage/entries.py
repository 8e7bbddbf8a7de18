"""One tensor of a checkpoint, as it lies in a file and as it is written into another; never a whole model.

A tensor is mapped, not loaded: its pages belong to the file, and the kernel may drop them whenever memory is short.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 22  # bytes read, hashed and written at once


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `start` to `stop` of `file`.

    `dtype` and `shape` are those of the tensor when it is read. If it is plain, the bytes are its numbers, row by row
    and in little endian; if not (a quantised one, say), only its format can read them.
    """

    name: str
    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int
    stop: int
    is_plain: bool = True

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.dtype)

    @property
    def is_float(self) -> bool:
        return self.torch_dtype is not None and self.torch_dtype.is_floating_point

    def read(self) -> Tensor:
        """The tensor, mapped from the file; writing to it copies the page and leaves the file alone.

        Raises ValueError if torch has no dtype for it.
        """
        assert self.is_plain, f"{self.file}: {self.name} can be read by its format alone"
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.file}: {self.name} has the dtype {self.dtype}, which cannot be read here")
        dtype = DTYPES[self.dtype]
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        first = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as handle:
            pages = mmap.mmap(handle.fileno(), self.stop - first, offset=first, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=dtype, offset=self.start - first).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they lie in the file."""
        with self.file.open("rb") as handle:
            handle.seek(self.start)
            left = self.num_bytes
            while left:
                chunk = handle.read(min(left, _CHUNK))
                if not chunk:
                    raise ValueError(f"{self.file} was cut off while {self.name} was read")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: its bytes are asked for when its turn comes, and need not be held before."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 0

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        return cls(NAMES[tensor.dtype], tuple(tensor.shape), lambda: _bytes_of(tensor))

    @classmethod
    def made(cls, make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
        """A tensor that exists only while it is written."""
        return cls(NAMES[dtype], shape, lambda: _bytes_of(make()))


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        yield flat.view(torch.uint8).numpy().data


def main_dtype(entries: Iterable[Entry]) -> torch.dtype | None:
    """The dtype of the first weight, by file and name: the one that `from_pretrained` takes where no config says it.

    Packed weights and tensors without numbers do not count; None if there is no other.
    """
    for entry in sorted(entries, key=lambda entry: (entry.file.name, entry.name)):
        dtype = entry.torch_dtype
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 and entry.num_bytes:
            return dtype
    return None
