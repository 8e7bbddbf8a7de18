"""transformers' Trainer with the loss of distillation, and the windows with what the teacher said about them.

Shape letters: B windows, T tokens, V vocabulary, K tokens kept of each position, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tensormix.data import IGNORED, Mixture
from tensormix.recover.losses import Kept, counted, divergence, kept_divergence, relative_distance
from tensormix.recover.teacher import TeacherLogits
from tensormix.recover.watch import PATIENCE
from tensormix.recover.zeroth_order import ZerothOrderDescent
from tensormix.settings import Recover
from tensormix.sites import blocks

NUM_LOSS_ROWS = 60


class TaughtWindows(Dataset):
    """The windows of a mixture from `first` on; the first `num_taught` of them with what is kept of the logits, or, of
    a teacher that runs beside the model, with a mark that says so."""

    def __init__(self, mixture: Mixture, logits: TeacherLogits | None, *, first: int, num_taught: int) -> None:
        self.mixture, self.logits, self.first, self.num_taught = mixture, logits, first, num_taught

    def __len__(self) -> int:
        return len(self.mixture) - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.mixture[self.first + index]
        if index >= self.num_taught:
            return window
        return window | ({"taught": torch.tensor(True)} if self.logits is None else self.logits[self.first + index])


def arguments(settings: Recover, folder: Path, dtype: str, seed: int, steps: int, rate: float) -> TrainingArguments:
    """How the Trainer is told what a recovery asks for."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=rate,
        lr_scheduler_type="cosine" if settings.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=dtype == "bfloat16",
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="sequential",  # window i is the i-th draw of the mixture already
        remove_unused_columns=False,  # what the teacher said belongs to no argument of the model
        logging_steps=max(1, steps // NUM_LOSS_ROWS),
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="steps" if steps > settings.save_every else "no",
        save_steps=settings.save_every,
        save_total_limit=2 + math.ceil(PATIENCE * max(1, steps // NUM_LOSS_ROWS) / settings.save_every),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


class DistillTrainer(Trainer):
    """KL to the teacher where a batch carries the teacher's logits, the model's own loss on the text where not. Of a
    batch in which no label counts either is 0.

    `teacher` runs beside the model where a batch is to be taught and carries no logits, and where `hidden` is not 0:
    the weight of the distance between the residual streams behind every block, relative to the teacher's.
    """

    teacher: nn.Module | None = None
    hidden: float = 0.0
    descent: ZerothOrderDescent | None = None  # the optimizer, where there are no gradients

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.descent is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.eval()  # both sides of a direction must be the same function
        inputs = self._prepare_inputs(inputs)
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        share = 1 if whole else 1 / self.args.gradient_accumulation_steps

        def loss() -> Tensor:
            with self.compute_loss_context_manager():
                return share * self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)

        return self.descent.ask(loss, self.state.global_step)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if _is_text(inputs):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, outputs = batch_loss(model, inputs, self.teacher, self.hidden)
        if self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None:
            loss = loss / self.args.gradient_accumulation_steps  # what such a model's own loss has in it already
        return (loss, outputs) if return_outputs else loss


def batch_loss(model: Any, inputs: Any, teacher: Any, hidden: float) -> tuple[Tensor, Any]:
    """The loss of a batch, as `DistillTrainer` has it, and the model's outputs."""
    ids, which = inputs["input_ids"], counted(inputs["labels"], IGNORED)
    if _is_text(inputs):
        outputs = model(ids, labels=inputs["labels"], use_cache=False)
        return outputs.loss, outputs
    cached = "teacher_tokens" in inputs
    taught = cached or "taught" in inputs
    with residual_streams(model) as ours:
        outputs = model(ids, use_cache=False)
    theirs, wanted = _asked(teacher, ids) if taught and (hidden or not cached) else ([], None)
    logits = outputs.logits[:, :-1][which]
    if not which.any():
        loss = logits.float().sum()  # of nothing: 0, and so is its gradient; a mean would be no number
    elif cached:
        loss = kept_divergence(logits, kept_of(inputs, which)).mean()
    else:
        assert wanted is not None
        loss = divergence(logits, wanted[:, :-1][which]).mean()
    if hidden and taught:
        loss = loss + hidden * relative_distance(ours, theirs)
    return loss, outputs


def kept_of(inputs: Any, which: Tensor) -> Kept:
    """What a batch carries of the teacher's logits, at the positions that count."""
    return Kept(*(inputs[f"teacher_{name}"][which] for name in Kept._fields))


def _is_text(inputs: Any) -> bool:
    """Whether a batch is learned from its tokens alone."""
    taught = "teacher_tokens" in inputs or "taught" in inputs
    return not taught and bool(counted(inputs["labels"], IGNORED).any())


@torch.no_grad()
def _asked(teacher: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:  # (B, T) -> (B, T, D) each, (B, T, V)
    """What the teacher makes of a batch: its residual streams and its logits."""
    with residual_streams(teacher) as streams:
        logits = teacher(ids, use_cache=False).logits
    return streams, logits


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
