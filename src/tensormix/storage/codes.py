"""Tensors that are codes, not weights: told by their dtype, and refused where nothing declares how they are scaled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from tensormix.storage.entries import Entry

DECLARATION = "hf_quant_config.json"  # where ModelOpt says what it did, if config.json does not


def is_code(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype can only stand for weights together with a scale."""
    if dtype.is_floating_point:
        return dtype.itemsize == 1
    return dtype not in (torch.bool, torch.int64)


def holds_codes(entry: Entry) -> bool:
    """Whether the tensor may be codes; a dtype that torch does not have is one of four or six bits."""
    return entry.torch_dtype is None or is_code(entry.torch_dtype)


def codes_of(target: str, names: list[str], entries: Mapping[str, Entry]) -> Entry | None:
    """Of the tensors that a model does not know, the codes that stand in the place of its parameter `target`."""
    module = target.rpartition(".")[0] if target.endswith(".weight") else target
    for name in names:
        if (
            name.startswith((f"{module}.", f"{module}_"))
            and holds_codes(entries[name])
            and len(entries[name].shape) > 1
        ):
            return entries[name]
    return None


def refusal_of(entry: Entry, folder: Path) -> ValueError:
    """The sentence about codes that a model would take for weights, and nothing says how they are scaled."""
    return ValueError(
        f"{entry.file}: {entry.name} is stored as {_named(entry)}, and nothing in config.json says how it is scaled: "
        f"codes are no weights{_declared_by(folder)}. Take the model's original checkpoint, or convert this one where "
        "its own library runs"
    )


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
