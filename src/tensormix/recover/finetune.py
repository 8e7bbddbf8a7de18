"""Recovery by fixed-budget training: every checkpoint gets the same number of steps on the same windows ([M], Methods).

The windows are a function of the seed alone (`data.Mixture`), so two checkpoints of a sweep read the same text.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tensormix.data import Mixture
from tensormix.files import read_json, write_json
from tensormix.operators import ExpertStack, StructuredLinear
from tensormix.settings import Recover

Row = dict[str, Any]
MARK = "whole.json"  # written into a checkpoint when everything else in it is: name and size of each file
NUM_LOSS_ROWS = 60


class _Watch(TrainerCallback):
    """Notes the losses, stops at the first one that is no number, and marks checkpoints that are whole."""

    def __init__(self, tokens_per_step: int, progress: Callable[[int, int], None] | None) -> None:
        self.rows: list[Row] = []
        self.tokens_per_step, self.progress, self.began = tokens_per_step, progress, time.perf_counter()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs: dict | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(float(logs["loss"])):
            raise ValueError(
                f"recover: the loss is {logs['loss']} at step {state.global_step}; lower learning_rate "
                f"(now {args.learning_rate:g}) or raise warmup."
            )
        self.rows.append(
            {
                "kind": "loss",
                "step": state.global_step,
                "loss": float(logs["loss"]),
                "learning_rate": float(logs["learning_rate"]),
                "tokens": state.global_step * self.tokens_per_step,
                "seconds": round(time.perf_counter() - self.began, 3),
            }
        )

    def on_save(self, args, state, control, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / MARK, {"files": _sizes(folder), "rows": self.rows})


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file() and file.name != MARK}


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose mark is there and agrees with its files; one cut off while being written has none."""
    whole = [
        checkpoint
        for checkpoint in folder.glob("checkpoint-*")
        if (checkpoint / MARK).exists() and read_json(checkpoint / MARK)["files"] == _sizes(checkpoint)
    ]
    return max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def compressed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that stand inside structured operators, their biases included."""
    operators = [module for module in model.modules() if isinstance(module, StructuredLinear | ExpertStack)]
    return {parameter for operator in operators for parameter in operator.parameters()}


def _arguments(settings: Recover, folder: Path, dtype: str, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=dtype == "bfloat16",
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="sequential",  # window i is the i-th draw of the mixture already
        logging_steps=max(1, settings.steps // NUM_LOSS_ROWS),
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="steps" if settings.steps > settings.save_every else "no",
        save_steps=settings.save_every,
        save_total_limit=2,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def recover(
    model: Any,
    tokenizer: Any,
    settings: Recover,
    *,
    folder: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Train `model` in place for exactly `settings.steps` steps; returns the losses as rows.

    Weights and optimizer are kept in float32 whatever the model's dtype (bfloat16 models compute under autocast), and
    the model goes back to its dtype at the end. Checkpoints lie in `folder`, a later call goes on from the newest
    whole one, and they are removed when the last step is done.

    Raises:
        ValueError: a source without text or shorter than one window, `parameters: compressed` on a model without
            structured operators, a loss that is no number.
    """
    dtype = next(model.parameters()).dtype
    name = str(dtype).removeprefix("torch.")
    windows = Mixture(
        tokenizer,
        settings.text,
        window=settings.window,
        num_windows=settings.steps * settings.batch_size,
        seed=seed,
        answers_only=settings.loss_on == "answers",
    )
    trained = set(model.parameters()) if settings.parameters == "all" else compressed_parameters(model)
    if not trained:
        raise ValueError("recover: parameters 'compressed' needs a structured operator in the model; it has none.")
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    watch = _Watch(settings.batch_size * settings.window, progress)
    start = last_whole_checkpoint(folder) if folder.exists() else None
    if start is not None:
        watch.rows = read_json(start / MARK)["rows"]
    trainer = Trainer(
        model=model, args=_arguments(settings, folder, name, seed), train_dataset=windows, callbacks=[watch]
    )
    trainer.remove_callback(PrinterCallback)  # the rows say it
    cache = model.config.use_cache
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        for parameter, wanted in needed.items():
            parameter.requires_grad_(wanted)
        model.config.use_cache = cache
        model.to(dtype).eval()
    shutil.rmtree(folder, ignore_errors=True)
    return watch.rows
