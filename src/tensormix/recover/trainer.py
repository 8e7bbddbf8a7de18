"""transformers' Trainer with the loss of distillation, and the windows with what the teacher said about them.

Shape letters: B windows, T tokens, V vocabulary, K tokens kept of each position, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from tensormix.data import IGNORED, Mixture
from tensormix.recover.losses import counted, relative_distance, top_k_divergence
from tensormix.recover.teacher import TeacherLogits
from tensormix.sites import blocks


class TaughtWindows(Dataset):
    """The windows of a mixture from `first` on; the first `num_taught` of them with what is kept of the logits."""

    def __init__(self, mixture: Mixture, logits: TeacherLogits | None, *, first: int, num_taught: int) -> None:
        self.mixture, self.logits, self.first, self.num_taught = mixture, logits, first, num_taught

    def __len__(self) -> int:
        return len(self.mixture) - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.mixture[self.first + index]
        return window if self.logits is None or index >= self.num_taught else window | self.logits[self.first + index]


class DistillTrainer(Trainer):
    """KL to the teacher where a batch carries the teacher's logits, the model's own loss on the text where not. Of a
    batch in which no label counts either is 0.

    `teacher` runs beside the model only if `hidden` is not 0: the weight of the distance between the residual streams
    behind every block, relative to the teacher's.
    """

    teacher: nn.Module | None = None
    hidden: float = 0.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        ids, which, taught = inputs["input_ids"], counted(inputs["labels"], IGNORED), "teacher_tokens" in inputs
        if which.any() and not taught:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        with residual_streams(model) as ours:
            outputs = model(ids, use_cache=False)
        logits = outputs.logits[:, :-1][which]
        if which.any():
            kept = (inputs[f"teacher_{name}"][which] for name in ("tokens", "values", "tail"))
            loss = top_k_divergence(logits, *kept).mean()
        else:
            loss = logits.float().sum()  # of nothing: 0, and so is its gradient; a mean would be no number
        if self.hidden and self.teacher is not None and taught:
            with torch.no_grad(), residual_streams(self.teacher) as theirs:
                self.teacher(ids, use_cache=False)
            loss = loss + self.hidden * relative_distance(ours, theirs)
        return (loss, outputs) if return_outputs else loss


@contextmanager
def residual_streams(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, a forward pass leaves what comes out of every block (B, T, D) in the list, in their order."""
    streams: list[Tensor] = []

    def hook(_block: nn.Module, _args: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(hook) for block in blocks(model)]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()
