"""What a model costs: parameters, multiply-accumulates, bytes, peak memory and latency, dense beside compressed.

Multiply-accumulates (MACs) are those of the linear layers, lm_head and routers, and of the experts that one token
visits, counted analytically; attention scores are not in them. A tied lm_head has no parameters of its own but is
multiplied all the same.
"""

from __future__ import annotations

import statistics
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tensormix.clock import seconds_of
from tensormix.models import quiet
from tensormix.sites import macs_per_token, num_parameters
from tensormix.storage.bits import stored_bits

Row = dict[str, Any]
DTYPES = ("float32", "bfloat16")  # that sizes are told in
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """What the model stores with its floating-point numbers in each of `DTYPES`; integers keep their size."""
    return {dtype: stored_bits(model, getattr(torch, dtype)) // 8 for dtype in DTYPES}


def embedding_bytes(model: Any) -> int:
    """Bytes of the input embeddings in the dtype in which the model was loaded."""
    weight = model.get_input_embeddings().weight
    return weight.numel() * weight.element_size()


def bytes_on_disk(model: Any, folder: Path | None) -> int:
    """Bytes of the weight files of a model in the dtype in which it was loaded.

    Taken from `folder` if it is saved there in that dtype; otherwise, so that dense and compressed are compared in one
    dtype, it is saved for a moment and measured.
    """
    files = sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []
    if files and stored_dtype(files[0]) == model.dtype:
        return sum(file.stat().st_size for file in files)
    with tempfile.TemporaryDirectory() as part, quiet():
        model.save_pretrained(part)
        return sum(file.stat().st_size for file in Path(part).glob("*.safetensors"))


def stored_dtype(file: Path) -> torch.dtype | None:
    """The dtype of the first floating-point tensor in a safetensors file that holds anything."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            tensor = tensors.get_slice(name)
            if 0 not in tensor.get_shape() and (dtype := SAFETENSORS_DTYPES.get(tensor.get_dtype())):
                return dtype
    return None


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of tensors that are alive; `peak` is their greatest sum. Exact on every device.

    What an operation uses inside itself and frees before it returns is not seen.
    """

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.live = self.peak = start
        self.known: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known and size:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._see(value)
        return out


@torch.no_grad()
def peak_memory(model: nn.Module, ids: Tensor) -> int:  # ids (B, T)
    """Bytes of weights and of live activations at the worst moment of one forward pass without cache."""
    weights = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    with LiveBytes(sum(weights.values())) as mode:
        mode.known |= set(weights)
        model(input_ids=ids, use_cache=False)
    return mode.peak


@torch.no_grad()
def latencies(models: dict[str, Any], num_tokens: int, repeats: int, seed: int = 0) -> list[Row]:
    """Milliseconds of one forward pass over `num_tokens` tokens, the models in turn so that all see the same machine.

    `speedup` is the median of the first model over the median of this one: above 1 is faster than the first.
    """
    limit = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(limit, (1, num_tokens), generator=torch.Generator().manual_seed(seed))
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 2):
        for name, model in models.items():
            device = next(model.parameters()).device
            here = ids.to(device)
            seconds = seconds_of(lambda m=model, x=here: m(input_ids=x, use_cache=False), device)
            if repeat >= 2:  # the first two only warm up
                times[name].append(1000 * seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = medians[next(iter(models))]
    return [
        {
            "kind": "latency",
            "model": name,
            "tokens": num_tokens,
            "median_ms": medians[name],
            "low_ms": _quantile(times[name], 0.25),
            "high_ms": _quantile(times[name], 0.75),
            "speedup": first / medians[name],
        }
        for name in models
    ]


def _quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def profile(models: dict[str, Any], folders: dict[str, Path], *, tokens: Sequence[int], repeats: int) -> list[Row]:
    """Rows of resources for each model and of latency for each number of tokens; the first model is the yardstick.

    `folders` says where each model lies on disk.
    """
    rows: list[Row] = []
    for name, model in models.items():
        ids = torch.zeros(1, max(tokens), dtype=torch.long, device=next(model.parameters()).device)
        rows.append(
            {
                "kind": "resources",
                "model": name,
                "parameters": num_parameters(model),
                "macs_per_token": macs_per_token(model),
                "bytes": bytes_by_dtype(model),
                "embedding_bytes": embedding_bytes(model),
                "bytes_on_disk": bytes_on_disk(model, folders.get(name)),
                "peak_memory_bytes": peak_memory(model, ids),
                "peak_memory_tokens": max(tokens),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            }
        )
    for num_tokens in tokens:
        rows += latencies(models, num_tokens, repeats)
    return rows
