"""How a causal language model is read: quiet, padded on the right, logits only where they are asked for.

Padding stands on the right and repeats the last token of its row. In a causal model no position sees a later one, so
the rows need neither an attention mask nor position ids, and every architecture reads them in the same way.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own mode back, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> str:
    """Name of the dtype of the model's first floating-point parameter, "float32" where it has none."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return str(parameter.dtype).removeprefix("torch.")
    return "float32"


def context_length(model: nn.Module) -> int | None:
    """The largest number of tokens that the model reads at once, None where its config states no limit."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor (B, T), and the position (B,) of the last real token of each."""
    longest = max(len(row) for row in rows)
    ids = [list(row) + [row[-1]] * (longest - len(row)) for row in rows]
    last = [len(row) - 1 for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(last, device=device)


def options_of(model: nn.Module, **wanted: Any) -> dict[str, Any]:
    """Those of the wanted options that the model's forward names."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in known}


def logits_at(
    model: nn.Module,
    ids: Tensor,  # (B, T)
    last: Tensor,  # (B,) one position in each row
    cache: Any = None,
) -> Tensor:
    """Logits (B, V) in fp32 at one position of each row; the head runs on the asked positions where the model can.

    `cache` holds the keys and values of tokens that stand before `ids`; it is extended in place.
    """
    positions, column = last.unique(return_inverse=True)
    options = options_of(model, logits_to_keep=positions, use_cache=cache is not None)
    if cache is not None:
        options["past_key_values"] = cache
    if "logits_to_keep" not in options:
        column = last
    logits = model(ids, **options).logits
    return logits[torch.arange(len(ids), device=ids.device), column].float()
