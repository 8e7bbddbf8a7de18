"""How much worse a model predicts a text when one block of it is changed, token by token.

Shape letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.evaluate.forward import device_of, options_of, quiet
from tensormix.sites.tails import Tails


class Rise(NamedTuple):
    """A mean over tokens in nats, and its standard error, as if the tokens were drawn one by one."""

    mean: float
    error: float

    @classmethod
    def over(cls, parts: Iterable[Tensor]) -> Rise:
        """Of the tokens of all parts, whatever their shapes."""
        each = torch.cat([part.flatten().double().cpu() for part in parts])
        return cls(float(each.mean()), float(each.std()) / sqrt(len(each)) if len(each) > 1 else 0.0)


class Rises:
    """Asks what a change does to the predictions of `model`, from the changed block on.

    Args:
        batches: token ids (B, T); their logits, in fp32 or wider, are held.
        measure: "kl", the divergence KL(dense || changed) at each token, or "loss", the rise of the negative
            log-likelihood of the next one, which may be below zero.
        from_blocks: whether `at` will be asked, for which what enters every block is held too.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], measure: str, *, from_blocks: bool = True) -> None:
        self.model, self.measure = model, measure
        self._batches = [batch.to(device_of(model)) for batch in batches]
        self._options = options_of(model, use_cache=False)
        with quiet(model):
            self._tails = Tails(model, len(batches), self._told) if from_blocks else None
            told = self._tails.first if self._tails else map(self._told, range(len(batches)))
            self._dense = list(told)

    def _told(self, number: int, model: nn.Module | None = None) -> Tensor:  # (B, T, V) for kl, (B, T - 1) for loss
        logits = (model or self.model)(self._batches[number], **self._options).logits
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        if self.measure == "kl":
            return log_p
        return F.nll_loss(log_p[:, :-1].mT, self._batches[number][:, 1:], reduction="none")

    def at(self, block: int) -> Rise:
        """Of the model as it is now, where no block before `block` was changed."""
        assert self._tails is not None
        with quiet(self.model):
            return self._mean(self._tails.run(block))

    def of(self, model: nn.Module) -> Rise:
        """Of another model of the same text, run whole."""
        with quiet(model):
            told = (self._told(number, model) for number in range(len(self._batches)))
            return self._mean(told)

    def _mean(self, told: Iterable[Tensor]) -> Rise:
        return Rise.over(self._of(before, after) for before, after in zip(self._dense, told, strict=True))

    def _of(self, before: Tensor, after: Tensor) -> Tensor:
        if self.measure == "loss":
            return after - before
        p = before.exp()
        return torch.where(p > 0, p * (before - after), 0).sum(-1)  # 0 log 0 is 0


def first_tokens(batches: Sequence[Tensor], num_tokens: int) -> list[Tensor]:  # (B, T) each
    """Sequences from the first on, one a batch, until there are so many tokens; the last is cut, but not below two."""
    found, left = [], num_tokens
    for row in (row for batch in batches for row in batch.split(1)):
        if left < 2:
            break
        found.append(row[:, :left])
        left -= found[-1].numel()
    return found
