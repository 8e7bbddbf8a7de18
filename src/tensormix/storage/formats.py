"""The formats that weights are read from: this table, and one file beside it for each of them.

A checkpoint is always written as safetensors. What the files of a format are called is known in this room alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tensormix.storage.entries import DTYPES, Entry, Piece
from tensormix.storage.gguf import Gguf
from tensormix.storage.safetensors import Safetensors

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Format(Protocol):
    """The weights of one model, as they lie in files of one kind. To open it reads headers only.

    Attributes:
        file_patterns: of the names of files that hold weights.
        index_patterns: of the names of files that say which tensor is in which of them.
        folder: the model's.
        files: those that hold its tensors.
        entries: every tensor, by the name that transformers would store it under.
    """

    file_patterns: ClassVar[tuple[str, ...]]
    index_patterns: ClassVar[tuple[str, ...]]
    folder: Path
    files: list[Path]
    entries: Mapping[str, Entry]

    @property
    def described(self) -> Mapping[str, Any] | None:
        """What config.json would say, where the files themselves say it; such files hold nothing but the model."""
        ...

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        """All weights of `folder`, or those in one `file` of it, or those that an index lists.

        Raises ValueError, naming the file, if one is missing, damaged or cut off.
        """
        ...

    def read(self, entry: Entry) -> Tensor:
        """The tensor in the dtype and shape of its entry: plain numbers, however they are stored."""
        ...

    def bits(self, entry: Entry) -> int:
        """What the tensor takes in its file, scales and all."""
        ...


FORMATS: dict[str, type[Format]] = {
    "safetensors": Safetensors,
    "gguf": Gguf,
}


def open_weights(folder: Path, file: Path | None = None) -> Format:
    """The weights in a model's folder: all of them, or those of one file.

    Raises ValueError if there are none or only pickled ones, and as the format does.
    """
    files = [file] if file is not None else [*weight_files(folder), *_indexes(folder)]
    if files and (found := format_of(files[0])) is not None:
        return found(folder, file)
    if pickled := [found.name for found in _matching(folder, PICKLED)]:
        raise ValueError(
            f"{folder} has pickled weights ({pickled[0]}), which can run code when they are read; convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
            "writes safetensors"
        )
    patterns = ", ".join(pattern for one in FORMATS.values() for pattern in one.file_patterns)
    raise ValueError(f"{folder} has a config.json but no weights ({patterns})")


def format_of(file: Path) -> type[Format] | None:
    """The format whose weights, or index of them, a file of this name is."""
    for one in FORMATS.values():
        if any(file.match(pattern) for pattern in (*one.file_patterns, *one.index_patterns)):
            return one
    return None


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights in a format that is read here, indexed or not."""
    return [file for one in FORMATS.values() for file in _matching(folder, one.file_patterns)]


def files_beside(folder: Path) -> list[Path]:
    """What lies beside the weights of a model and its config: the tokenizer and the like."""
    others = {*weight_files(folder), *_indexes(folder), *_matching(folder, PICKLED), folder / "config.json"}
    return [file for file in sorted(folder.iterdir()) if file.is_file() and file not in others]


def _indexes(folder: Path) -> list[Path]:
    return [file for one in FORMATS.values() for file in _matching(folder, one.index_patterns)]


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def passed_on(weights: Format, entry: Entry, dtype: torch.dtype | None = None) -> Piece | Entry:
    """A tensor to be written as it is, byte for byte where it is plain, or in another dtype."""
    if entry.is_plain and dtype in (None, entry.torch_dtype):
        return entry
    wanted = dtype or DTYPES[entry.dtype]
    return Piece.made(partial(_read_as, weights, entry, wanted), entry.shape, wanted)


def _read_as(weights: Format, entry: Entry, dtype: torch.dtype) -> Tensor:
    return weights.read(entry).to(dtype)
