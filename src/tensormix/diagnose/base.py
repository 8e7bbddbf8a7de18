"""What every diagnostic is: frozen settings that are called with a model and batches of tokens, and give rows.

A diagnostic sees models, never the code that compressed them: a checkpoint and its dense reference are enough.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tensormix.evaluate.forward import device_of, options_of, quiet
from tensormix.rows import Row
from tensormix.settings import Settings
from tensormix.sites.batches import batches_of

Batches = Sequence[Tensor]  # token ids (B, T) each
Compress = Callable[[nn.Module, int], None]  # compresses one block of a model in place, by its index


NEEDS = {
    "batches": "batches of tokens",
    "reference": "the dense model as reference",
    "compress": "a way to compress one block",
}


class Diagnostic(Settings, ABC):
    """One diagnostic with its settings; the docstring's first line is what `tensormix list diagnostics` shows."""

    looks_at: ClassVar[Literal["dense", "pair"]]  # the untouched model alone, or a compressed one beside it
    needs: ClassVar[tuple[str, ...]] = ("batches",)  # what `measure` is given beside the model: names of NEEDS
    name: str

    def __call__(
        self,
        model: nn.Module,
        batches: Any = (),
        *,
        reference: nn.Module | None = None,
        compress: Compress | None = None,
    ) -> list[Row]:
        """The rows about `model`.

        Args:
            batches: token ids in any form of `tensormix.sites.batches.batches_of`; diagnostics of weights alone do not
                read them.
            reference: the dense model, for a diagnostic that looks at a pair.
            compress: how one block is compressed, for a diagnostic that tries it.

        Raises:
            ValueError: it was not given what it needs, or what its docstring names.
        """
        batches = list(batches_of(model, batches) or ())
        given: dict[str, Any] = {"batches": batches or None, "reference": reference, "compress": compress}
        for part in self.needs:
            if given[part] is None:
                raise ValueError(f"{self.name}: it needs {NEEDS[part]}, and none was given")
        return self.measure(model, **{part: given[part] for part in self.needs})

    @abstractmethod
    def measure(self, model: nn.Module, **given: Any) -> list[Row]:
        """The rows about `model`, from what the diagnostic needs: its own parameters say what that is."""


def run(model: nn.Module, ids: Tensor) -> Any:  # (B, T)
    """What the model says about one batch, without keeping keys and values."""
    return model(ids.to(device_of(model)), **options_of(model, use_cache=False))


def run_hooked(model: nn.Module, batches: Batches, handles: Iterable[RemovableHandle]) -> None:
    """Run the model over all batches, for what the hooks of `handles` see; they are removed at the end."""
    with ExitStack() as hooks:
        for handle in handles:
            hooks.callback(handle.remove)
        with quiet(model):
            for ids in batches:
                run(model, ids)


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Mean negative log-likelihood (nats) of all tokens but the first of each row; losses in fp32, summed in fp64.

    Raises ValueError where no token has another one before it.
    """
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    with quiet(model):
        for ids in batches:
            logits, targets = run(model, ids).logits[:, :-1].float(), ids[:, 1:].flatten()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device), reduction="sum")
            total += losses.double().cpu()
            num_tokens += ids[:, 1:].numel()
    if num_tokens == 0:
        raise ValueError("diagnose: the loss needs windows of at least two tokens, and there are none")
    return float(total) / num_tokens


def perplexity_of(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # exp overflows fp64 at 709.8
