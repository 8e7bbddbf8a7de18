"""GGUF files, read tensor by tensor: the names, the order of rows and the numbers that transformers would hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensormix.storage.entries import NAMES, Entry
from tensormix.storage.files import read_json
from tensormix.storage.gguf.architectures import ARCHITECTURES
from tensormix.storage.gguf.configs import Description
from tensormix.storage.gguf.header import Header, Stored, read_header
from tensormix.storage.gguf.layouts import OF_BIASES, SHAPES, Layout
from tensormix.storage.gguf.numbers import PLAIN, is_readable, type_name, values_of
from tensormix.storage.gguf.record import Architecture

_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(.+?)(\.weight|\.bias)?")


class Gguf:
    """All tensors of one GGUF file, or of the files that one was split into; only headers are read.

    Args:
        file: the file, or any of its parts; None takes the only model of the folder.

    Attributes:
        dtype: of the tensors when they are read.
        described: what config.json would say.

    Raises:
        ValueError: a file is missing, damaged or cut off, there are several models to choose from, the package gguf is
            not installed, or the architecture, a tensor, its type or a key of the metadata is none that is read here.
    """

    file_patterns: ClassVar[tuple[str, ...]] = ("*.gguf",)
    index_patterns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        self.folder = folder
        self.files = _parts(file or only_model(folder))
        headers = [read_header(part) for part in self.files]
        self.first, self.metadata = self.files[0], headers[0].metadata
        self._tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
        self._check_tensors()
        self.architecture = _architecture(headers[0], self._tensors)
        self._description = Description(
            self.metadata,
            self.architecture,
            {name: tensor.shape for name, tensor in self._tensors.items()},
            {name: values_of(self._tensors[name]).tolist() for name in _FACTORS if name in self._tensors},
            str(self.first),
        )
        self.dtype = self._dtype()
        dtype = str(self.dtype).removeprefix("torch.")
        self.described: Mapping[str, Any] | None = {**self._description.config(), "dtype": dtype}
        self._parts: dict[str, tuple[Stored, Layout | None]] = {}
        self.entries: Mapping[str, Entry] = {entry.name: entry for entry in self._entries()}

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text or a turn of a chat."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = [self.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        return list(dict.fromkeys(one for one in found if one is not None))

    @property
    def has_tokenizer(self) -> bool:
        kind = self.metadata.get("tokenizer.ggml.model", "none")
        return kind not in ("none", "no_vocab") and bool(self.metadata.get("tokenizer.ggml.tokens"))

    def read(self, entry: Entry) -> Tensor:
        if entry.is_plain:
            return entry.read()
        stored, layout = self._parts[entry.name]
        values = values_of(stored)
        if layout is not None:
            values = layout(values.float(), self._description.heads).contiguous()
        return values.to(self.dtype)

    def bits(self, entry: Entry) -> int:
        return 8 * entry.num_bytes

    def _check_tensors(self) -> None:
        wanted = int(self.metadata.get("split.tensors.count", 0) or 0)
        if wanted and wanted != len(self._tensors):
            raise ValueError(
                f"{self.first} says that the model has {wanted} tensors, and its {len(self.files)} files hold "
                f"{len(self._tensors)}; fetch them again"
            )
        for tensor in self._tensors.values():
            if not is_readable(tensor.type):
                raise ValueError(
                    f"{tensor.file}: {tensor.name} is stored as {type_name(tensor.type)}, of which the installed "
                    "package gguf makes no numbers; a newer one may (pip install --upgrade gguf), or take another file"
                )

    def _dtype(self) -> torch.dtype:
        """That of config.json, if there is one, which is the model's own; else that of most numbers in the files.

        Codes stand for more than half precision holds: they become float32.
        """
        if (self.folder / "config.json").exists():
            config = read_json(self.folder / "config.json")
            named = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
            if named is not None:
                return getattr(torch, str(named))
        if any(tensor.type not in PLAIN for tensor in self._tensors.values()):
            return torch.float32
        counts: dict[torch.dtype, int] = {}
        for tensor in self._tensors.values():
            counts[PLAIN[tensor.type]] = counts.get(PLAIN[tensor.type], 0) + prod(tensor.shape)
        return max(counts, key=lambda dtype: counts[dtype])

    def _entries(self) -> Iterator[Entry]:
        for tensor in self._tensors.values():
            if tensor.name in _FACTORS:
                continue
            pattern, layout = self._name(tensor)
            for name, part in _experts(pattern, tensor):
                shape = SHAPES[layout](part.shape) if layout is not None and layout in SHAPES else part.shape
                is_plain = layout is None and PLAIN.get(tensor.type) == self.dtype
                self._parts[name] = part, layout
                yield Entry(name, part.file, NAMES[self.dtype], shape, part.start, part.stop, is_plain)

    def _name(self, tensor: Stored) -> tuple[str, Layout | None]:
        """What transformers calls a tensor, and how it lies in the file."""
        match = _NAME.fullmatch(tensor.name)
        assert match is not None
        number, stem, suffix = match.groups(default="")
        known = self.architecture.block if number else self.architecture.outside
        if stem not in known:
            raise ValueError(
                f"{tensor.file} holds {tensor.name}, and nothing is known of such a tensor in a model of "
                f"{self.architecture.model_type}; take the model's own folder of safetensors instead"
            )
        layout = self.architecture.layouts.get(stem)
        if suffix == ".bias" and layout not in OF_BIASES:
            layout = None
        path = f"{self.architecture.blocks}.{number}.{known[stem]}" if number else known[stem]
        return path + suffix, layout


def _experts(name: str, tensor: Stored) -> Iterator[tuple[str, Stored]]:
    """The tensor, or those of the single experts that it is stacked from, each by its name."""
    if "{}" not in name:
        yield name, tensor
        return
    size = (tensor.stop - tensor.start) // tensor.shape[0]
    for number in range(tensor.shape[0]):
        start = tensor.start + number * size
        yield name.format(number), replace(tensor, shape=tensor.shape[1:], start=start, stop=start + size)


def only_model(folder: Path) -> Path:
    """The file of a folder's only model, or the first of its parts. Raises ValueError if there is none or several."""
    files = sorted(folder.glob("*.gguf"))
    firsts = [file for file in files if (match := _PART.fullmatch(file.name)) is None or int(match[2]) == 1]
    if len(firsts) != 1:
        names = ", ".join(file.name for file in firsts[:6]) or "no first part"
        raise ValueError(f"{folder} holds several models as GGUF ({names}); name the file that is meant: {folder}/NAME")
    return firsts[0]


def _parts(file: Path) -> list[Path]:
    """The file, or all that it was split into."""
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    total = int(match[3])
    files = [file.with_name(f"{match[1]}-{number + 1:05d}-of-{match[3]}.gguf") for number in range(total)]
    for part in files:
        if not part.exists():
            raise ValueError(f"{part} is missing: {file.name} is one of {total} parts of a model")
    return files


def _architecture(header: Header, tensors: Mapping[str, Stored]) -> Architecture:
    """Raises ValueError if it is none of `ARCHITECTURES`."""
    name = header.architecture
    if header.metadata.get("general.type") == "adapter":
        raise ValueError(f"{header.file} is an adapter, not a model: merge it into its model first")
    if name == "llama" and header.metadata.get("llama.expert_count"):
        name = "llama with experts"
    if name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        name = "falcon with two norms"
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(name for name in ARCHITECTURES if " " not in name))
        raise ValueError(
            f"{header.file} holds a model of the architecture {name!r}, which cannot be read from GGUF; known are "
            f"{known}. Take the model's own folder of safetensors instead"
        )
    return ARCHITECTURES[name]
