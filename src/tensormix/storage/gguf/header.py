"""The header of a GGUF file: its metadata, and where every tensor lies; no tensor is read.

A vocabulary is walked over, not read: its tens of thousands of strings are most of a header, and of no use here.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # bytes, where the metadata say nothing else


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: bytes `start` to `stop`.

    `shape` is in the order of torch, `type` one of ggml by its number.
    """

    name: str
    file: Path
    type: int
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What stands before the data. Of arrays of strings the metadata hold the length alone."""

    file: Path
    metadata: dict[str, Any]
    tensors: list[Stored]

    @property
    def architecture(self) -> str:
        """Raises ValueError if the file does not say it; of a model in parts the first one does."""
        if "general.architecture" not in self.metadata:
            raise ValueError(f"{self.file} does not say of which architecture it is (general.architecture)")
        return str(self.metadata["general.architecture"])


def read_header(file: Path) -> Header:
    """Raises ValueError if the file is no GGUF, damaged, cut off, or holds a type of tensor that nobody knows."""
    size = file.stat().st_size
    if size < 24:
        raise ValueError(f"{file} is damaged or cut off (it has {size} bytes); fetch it again")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"GGUF":
            raise ValueError(f"{file} is no GGUF file, whatever its name says: it does not begin with GGUF")
        cursor = _Cursor(content, 4)
        (version,) = cursor.numbers("I")
        if version not in _VERSIONS:
            raise ValueError(f"{file} is of version {version} of GGUF; versions 2 and 3 in little endian can be read")
        try:
            return _header(file, cursor, size)
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
            raise ValueError(
                f"{file} is damaged or cut off (its header cannot be read: {error!r}); fetch it again"
            ) from error


def _header(file: Path, cursor: _Cursor, size: int) -> Header:
    num_tensors, num_values = cursor.numbers("QQ")
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        (kind,) = cursor.numbers("I")
        metadata[key] = cursor.value(kind)
    found = []
    for _ in range(num_tensors):
        name = cursor.string()
        (num_dimensions,) = cursor.numbers("I")
        shape = tuple(reversed(cursor.numbers(f"{num_dimensions}Q")))
        found.append((name, shape, *cursor.numbers("IQ")))
    alignment = int(metadata.get("general.alignment", _ALIGNMENT))
    start = -(-cursor.at // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in found:
        stop = start + offset + _num_bytes(file, name, kind, shape)
        if stop > size:
            raise ValueError(
                f"{file} is damaged or cut off ({name} ends at byte {stop}, and the file has {size}); fetch it again"
            )
        tensors.append(Stored(name, file, kind, shape, start + offset, stop))
    return Header(file, metadata, tensors)


def _num_bytes(file: Path, name: str, kind: int, shape: tuple[int, ...]) -> int:
    per_block, block_bytes = block_of(file, name, kind)
    if not shape or shape[-1] % per_block:
        raise ValueError(f"{file}: {name} has rows of {shape[-1:]} numbers, which are no whole blocks of {per_block}")
    return prod(shape) // per_block * block_bytes


def block_of(file: Path, name: str, kind: int) -> tuple[int, int]:
    """The numbers of one block of a type of ggml, and its bytes. Raises ValueError if the type is unknown."""
    package = library()
    try:
        return package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(
            f"{file}: {name} is stored as type {kind} of ggml, which the installed package gguf does not know; "
            "a newer one may: pip install --upgrade gguf"
        ) from None


def library() -> Any:
    """The package gguf, which knows how blocks are laid out. Raises ValueError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "GGUF files are read with the package gguf, which is not installed: pip install 'tensormix[gguf]'"
        ) from None
    return gguf


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, content: mmap.mmap, at: int) -> None:
        self.content, self.at = content, at

    def numbers(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{format}", self.content, self.at)
        self.at += struct.calcsize(f"<{format}")
        return values

    def string(self) -> str:
        (length,) = self.numbers("Q")
        found = self.content[self.at : self.at + length]
        if len(found) < length:
            raise struct.error(f"a text of {length} bytes goes beyond the end")
        self.at += length
        return found.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(_NUMBERS[kind])[0]
        kind, count = self.numbers("IQ")
        if kind in _NUMBERS:
            return list(self.numbers(f"{count}{_NUMBERS[kind]}"))
        for _ in range(count):
            if kind == _STRING:
                (length,) = self.numbers("Q")
                self.at += length
            else:
                self.value(kind)
        return count
