"""Safetensors, read and written tensor by tensor, never as a whole."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tensormix.storage.entries import DTYPES, Entry, Piece
from tensormix.storage.files import new_file, read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_ALIGNMENT = 64  # bytes at which the data begins: what the matrix kernels of processors like best


class Safetensors:
    """All tensors of a folder of safetensors, with one index or in a single file; only the headers are read.

    Args:
        file: read this file alone, or the files that this index lists.

    Raises:
        ValueError: a file is missing, damaged or cut off (the sentence names the file and the tensor), no index says
            which tensor is where, or the index and the files disagree.
    """

    file_patterns: ClassVar[tuple[str, ...]] = ("*.safetensors",)
    index_patterns: ClassVar[tuple[str, ...]] = ("*.safetensors.index.json",)
    described: Mapping[str, Any] | None = None

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        self.folder = folder
        first = file or next((folder / name for name in (SINGLE, INDEX) if (folder / name).exists()), None)
        if first is None:  # a single file goes before an index, as it does for transformers
            other = next(iter(sorted(folder.glob(self.file_patterns[0]))), folder)
            raise ValueError(
                f"{folder} has {other.name}, but neither {SINGLE} nor {INDEX} to say which tensor is where"
            )
        listed = _weight_map(first) if first.match(self.index_patterns[0]) else None
        self.files = [first] if listed is None else [folder / name for name in sorted(set(listed.values()))]
        self.entries: Mapping[str, Entry] = _entries(self.files, first, listed)

    def read(self, entry: Entry) -> Tensor:
        return entry.read()

    def bits(self, entry: Entry) -> int:
        return 8 * entry.num_bytes


def _entries(files: list[Path], index: Path, listed: dict[str, str] | None) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing, but {index.name} names it")
        for entry in read_header(file):
            if listed is not None and listed.get(entry.name) != file.name:
                where = f"in {listed[entry.name]}" if entry.name in listed else "nowhere"
                raise ValueError(f"{file} holds {entry.name}, but {index.name} has it {where}: they disagree")
            entries[entry.name] = entry
    for name in (listed or {}).keys() - entries.keys():
        file = index.parent / (listed or {})[name]
        raise ValueError(f"{file} does not hold {name}, but {index.name} says so: they disagree")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index)
    found = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index} has no weight_map that says which tensor is in which file; fetch it again")
    return found


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


def shard_name(number: int, total: int) -> str:
    """Of one file of several, counted from 0, as transformers names them."""
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def write_index(files: Iterable[Path], folder: Path) -> None:
    """The index of a folder: which of its finished files holds which tensor."""
    entries = sorted((entry for file in files for entry in read_header(file)), key=lambda entry: entry.name)
    total = sum(entry.num_bytes for entry in entries)
    weight_map = {entry.name: entry.file.name for entry in entries}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


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
