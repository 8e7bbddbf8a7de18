"""Checkpoints as they lie on disk: safetensors read and written tensor by tensor, never as a whole.

A tensor is mapped, not loaded: its pages belong to the file, and the kernel may drop them whenever memory is short.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tensormix.storage.files import new_file, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_ALIGNMENT = 64  # bytes at which the data begins: what the matrix kernels of processors like best
_CHUNK = 1 << 22  # bytes read, hashed and written at once


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `start` to `stop` of `file`."""

    name: str
    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int
    stop: int

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
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), lambda: _bytes_of(tensor))

    @classmethod
    def cast(cls, entry: Entry, dtype: torch.dtype) -> Piece:
        """The tensor at `entry` in another dtype."""
        return cls.made(lambda: entry.read().to(dtype), entry.shape, dtype)

    @classmethod
    def made(cls, make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
        """A tensor that exists only while it is written."""
        return cls(_NAMES[dtype], shape, lambda: _bytes_of(make()))


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        yield flat.view(torch.uint8).numpy().data


class Checkpoint:
    """All tensors of a folder of safetensors, with one index or in a single file; only the headers are read.

    Raises:
        ValueError: there are no weights or pickled ones, a file is missing, damaged or cut off (the sentence names
            the file and the tensor), or the index and the files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        # A single file goes before an index, as it does for transformers.
        listed = _weight_map(index) if index.exists() and not (folder / SINGLE).exists() else None
        self.files = [folder / name for name in sorted(set(listed.values()))] if listed else _single_files(folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            if not file.exists():
                raise ValueError(f"{file} is missing, but {INDEX} names it")
            for entry in read_header(file):
                if listed is not None and listed.get(entry.name) != file.name:
                    where = f"in {listed[entry.name]}" if entry.name in listed else "nowhere"
                    raise ValueError(f"{file} holds {entry.name}, but {INDEX} has it {where}: they disagree")
                self.entries[entry.name] = entry
        for name in (listed or {}).keys() - self.entries.keys():
            raise ValueError(
                f"{folder / (listed or {})[name]} does not hold {name}, but {INDEX} says so: they disagree"
            )

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index)
    found = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index} has no weight_map that says which tensor is in which file; fetch it again")
    return found


def _single_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise ValueError(f"{folder} has {others[0]}, but neither {SINGLE} nor {INDEX} to say which tensor is where")
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} has pickled weights ({pickled[0]}), which can run code when they are read; convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
            "writes safetensors"
        )
    raise ValueError(f"{folder} has a config.json but no weights (*.safetensors)")


def read_header(file: Path) -> list[Entry]:
    """What a safetensors file holds, in the order of the bytes. Raises ValueError if it is damaged or cut off."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                f"{file} is damaged or cut off (its header does not fit into its {size} bytes); fetch it again"
            )
        text = handle.read(length)
    entries = []
    try:
        for name, item in json.loads(text).items():
            if name != "__metadata__":
                start, stop = (int(n) for n in item["data_offsets"])
                shape = tuple(int(n) for n in item["shape"])
                entries.append(Entry(name, file, str(item["dtype"]), shape, 8 + length + start, 8 + length + stop))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged or cut off (its header cannot be read: {error!r}); fetch it again"
        ) from error
    for entry in sorted(entries, key=lambda entry: entry.start):
        _check_entry(entry, size)
    return sorted(entries, key=lambda entry: entry.start)


def _check_entry(entry: Entry, size: int) -> None:
    if not 0 <= entry.start <= entry.stop <= size:
        raise ValueError(
            f"{entry.file} is damaged or cut off ({entry.name} ends at byte {entry.stop}, and the file has {size}); "
            "fetch it again"
        )
    if entry.dtype in DTYPES and entry.num_bytes != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
        raise ValueError(
            f"{entry.file} is damaged or cut off ({entry.name} has {entry.num_bytes} bytes, "
            f"not those of its shape {entry.shape} in {entry.dtype}); fetch it again"
        )


def write_shard(path: Path, pieces: Mapping[str, Piece | Entry]) -> tuple[int, str]:
    """Write tensors as one safetensors file, whole or not at all; returns its size in bytes and its SHA-256."""
    order = sorted(pieces, key=lambda name: (-_alignment(pieces[name]), name))  # so that every tensor stays aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        piece = pieces[name]
        stop = offset + piece.num_bytes
        header[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with new_file(path) as handle:
        for chunk in _all_chunks([len(text).to_bytes(8, "little"), text], [pieces[name] for name in order]):
            digest.update(chunk)
            handle.write(chunk)
    return 8 + len(text) + offset, digest.hexdigest()


def _all_chunks(head: list[bytes], pieces: list[Piece | Entry]) -> Iterator[bytes | memoryview]:
    yield from head
    for piece in pieces:
        yield from piece.chunks()


def _alignment(piece: Piece | Entry) -> int:
    return DTYPES[piece.dtype].itemsize if piece.dtype in DTYPES else 0


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Raise ValueError, with both numbers, if the disk under `folder` has less than `needed` bytes free."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{there} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed; nothing was written"
        )
