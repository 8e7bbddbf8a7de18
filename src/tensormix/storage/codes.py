"""Tensors that are codes, not weights: told by their dtype, and refused where nothing declares how they are scaled."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from tensormix.storage.entries import Entry
from tensormix.storage.packed import Pack, pack_of

DECLARATION = "hf_quant_config.json"  # where ModelOpt says what it did, if config.json does not
_FLOATS = ("F64", "F32", "F16", "BF16")
# What models keep as integers themselves: masks and positions of their first releases.
_COUNTS = ("I64", "BOOL")
_OF_MODELS = ("bias", "mask", "_ids", "index", "indices")


def is_code(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype can only stand for weights together with a scale."""
    if dtype.is_floating_point:
        return dtype.itemsize == 1
    return dtype not in (torch.bool, torch.int64)


def refuse_codes(entries: Mapping[str, Entry], quantization_config: Mapping[str, Any] | None, folder: Path) -> None:
    """Raise ValueError, naming the tensor, if one is stored as codes and the config does not say how they are scaled.

    Also if the config says that the checkpoint is packed in a way that is not read here.
    """
    config = quantization_config or {}
    is_own = config.get("quant_method") == "tensormix"
    pack = pack_of(config.get("packed") if is_own else quantization_config)
    operators = config.get("operators", {}) if is_own else {}
    for entry in entries.values():
        if _may_be_codes(entry) and not _is_declared(entry.name, entries, pack, operators):
            raise ValueError(
                f"{entry.file}: {entry.name} is stored as {_named(entry)}, and nothing in config.json says how it is "
                f"scaled: codes are no weights{_declared_by(folder)}. Take the model's original checkpoint, or convert "
                "this one where its own library runs"
            )


def _may_be_codes(entry: Entry) -> bool:
    if entry.dtype in (*_FLOATS, *_COUNTS) or len(entry.shape) < 2:
        return entry.dtype.startswith("F8_") and len(entry.shape) == 1 and entry.name.endswith("weight")
    return entry.dtype.startswith("F") or not entry.name.endswith(_OF_MODELS)


def _is_declared(name: str, stored: Container[str], pack: Pack | None, operators: Mapping[str, Any]) -> bool:
    if any(name.startswith(f"{operator}.") for operator in operators):
        return True
    return pack is not None and len(pack.companions(pack.dense_name(name), stored)) > 1


def _named(entry: Entry) -> str:
    dtype = entry.torch_dtype
    return entry.dtype if dtype is None else str(dtype).removeprefix("torch.")


def _declared_by(folder: Path) -> str:
    """What another file says about the codes, which is no declaration that is read here."""
    try:
        found = json.loads((folder / DECLARATION).read_text(encoding="utf-8"))
        name = found.get("producer", {}).get("name", "another program")
        return f" ({DECLARATION} says that {name} made them: {found['quantization']['quant_algo']})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
