"""Recovery by fixed-budget training: every checkpoint gets the same number of steps on the same windows
(arXiv 2605.25344, Methods).

The windows are a function of the seed alone (`data.Mixture`), so two checkpoints of a sweep read the same text,
whatever their loss is. A recovery of S steps with the loss `local_then_kl` reads its windows in this order:

    distill.local_steps     every compressed block alone, on what the dense block gives     (`recover.local`)
    the steps between       the whole model on the dense model's logits                     (kl)
    distill.task_steps      the whole model on the text                                     (lm)
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from tensormix.data import Mixture
from tensormix.models import ModelSource, load_model, load_tokenizer
from tensormix.recover.local import distill_blocks, learning_blocks
from tensormix.recover.lora import Patches, Turns, patched
from tensormix.recover.rates import compressed_parameters, parameter_groups
from tensormix.recover.teacher import TeacherLogits, check_vocabulary, tokenizer_digest
from tensormix.recover.trainer import DistillTrainer, TaughtWindows
from tensormix.recover.watch import MARK, PATIENCE, Row, Watch, last_whole_checkpoint
from tensormix.settings import Recover
from tensormix.storage.files import read_json

NUM_LOSS_ROWS = 60
Judge = Callable[[Any, int], bool]


def _arguments(settings: Recover, folder: Path, dtype: str, seed: int, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
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


def recover(
    model: Any,
    tokenizer: Any,
    settings: Recover,
    *,
    folder: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    teacher: ModelSource | str | Path | None = None,
    cache: Path | None = None,
    judge: Judge | None = None,
) -> list[Row]:
    """Train `model` in place for exactly `settings.steps` steps; returns the losses as rows.

    Weights and optimizer are kept in float32 whatever the model's dtype (bfloat16 models compute under autocast), and
    the model goes back to its dtype at the end. Checkpoints lie in `folder`, a later call goes on from the newest
    whole one, and they are removed when the last step is done.

    Args:
        teacher: the dense model, for the losses that need one; `settings.distill.teacher` wins over it.
        cache: a folder for what is kept of its logits, shared by all runs that read the same windows;
            `settings.distill.cache` wins over it, and without either they are removed with the checkpoints.
        judge: asked with the model and the step at every checkpoint; True ends the recovery there.

    Raises:
        ValueError: a source without text or shorter than one window, `parameters: compressed` or `lora` on a model
            without structured operators, `lora` on one with compressed experts, a teacher with another vocabulary,
            logits kept for another teacher, a run that diverges (its last good checkpoint stays).
    """
    dtype = next(model.parameters()).dtype
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    use_cache = model.config.use_cache
    patching = patched(model, settings.lora, seed) if settings.parameters == "lora" else nullcontext()
    try:
        model.float()
        with patching as patches:
            trained = _trained(model, settings, patches)
            job = _Recovery(model, tokenizer, settings, folder, seed, trained, str(dtype).removeprefix("torch."))
            job.patches = patches
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in trained)
            if settings.recompute:
                _checkpointing(model, "enable")({"use_reentrant": False})
            rows = job.run(teacher, cache, progress, judge)
    finally:
        for parameter, wanted in needed.items():
            parameter.requires_grad_(wanted)
        model.config.use_cache = use_cache
        if settings.recompute:
            _checkpointing(model, "disable")()
        model.to(dtype).eval()
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def _trained(model: Any, settings: Recover, patches: Patches | None) -> set[nn.Parameter]:
    if patches is not None:
        return patches.parameters
    trained = set(model.parameters()) if settings.parameters == "all" else compressed_parameters(model)
    if not trained:
        raise ValueError("recover: parameters 'compressed' needs a structured operator in the model; it has none.")
    return trained


def _checkpointing(model: Any, action: str) -> Callable[..., None]:
    """The model's method, which transformers renamed on the way to version 6."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    return getattr(model, f"{kind}_checkpointing_{action}")


class _Recovery:
    """One recovery: how its windows are shared between the phases."""

    patches: Patches | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Recover,
        folder: Path,
        seed: int,
        trained: set[nn.Parameter],
        dtype: str,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.folder, self.seed = model, tokenizer, settings, folder, seed
        self.trained, self.dtype = trained, dtype
        self.windows = Mixture(
            tokenizer,
            settings.text,
            window=settings.window,
            num_windows=settings.steps * settings.batch_size,
            seed=seed,
            answers_only=settings.loss_on == "answers",
        )
        local = settings.loss == "local_then_kl" and bool(learning_blocks(model, trained))
        self.local_steps = settings.distill.local_steps if local else 0
        self.task_steps = settings.steps if settings.loss == "lm" else settings.distill.task_steps
        self.taught_steps = max(0, settings.steps - self.local_steps - self.task_steps)

    def run(
        self,
        teacher_source: ModelSource | str | Path | None,
        cache: Path | None,
        progress: Callable[[int, int], None] | None,
        judge: Judge | None,
    ) -> list[Row]:
        rows: list[Row] = []
        logits = teacher = None
        if self.settings.loss != "lm":
            source = self.settings.distill.teacher or teacher_source
            if source is None:
                raise ValueError(
                    f"recover: the loss {self.settings.loss} needs a teacher; name one as distill.teacher."
                )
            source = ModelSource.of(source)
            teacher = self._teacher(source)
            logits = self._logits(teacher, source, cache)
            rows = self._local(teacher, progress) if self.local_steps else []
        dataset = TaughtWindows(
            self.windows,
            logits,
            first=self.local_steps * self.settings.batch_size,
            num_taught=self.taught_steps * self.settings.batch_size,
        )
        return rows + self._global(dataset, teacher if self.settings.distill.hidden else None, progress, judge)

    def _teacher(self, source: ModelSource) -> Any:
        teacher: Any = load_model(source, dtype="float32")
        check_vocabulary(teacher, self.model)
        if tokenizer_digest(load_tokenizer(source)) != tokenizer_digest(self.tokenizer):
            raise ValueError(
                f"recover: the tokenizer of the teacher ({source}) means other tokens than the model's; distillation "
                "compares logits token by token, so it needs a teacher with the same tokenizer."
            )
        return teacher.to(next(self.model.parameters()).device).requires_grad_(False)

    def _logits(self, teacher: Any, source: ModelSource, cache: Path | None) -> TeacherLogits:
        """Filled for the steps that learn from them."""
        settings = self.settings
        about: dict[str, Any] = {
            "teacher": source.fingerprint,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "vocabulary": teacher.get_output_embeddings().weight.shape[0],
            "top_k": settings.distill.top_k,
            "window": settings.window,
        }
        asked = [about, self.seed, settings.loss_on, [text.model_dump(mode="json") for text in settings.text]]
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        own = settings.distill.cache
        logits = TeacherLogits(Path(own) if own is not None else (cache or self.folder / "teacher") / name, **about)
        first = self.local_steps * settings.batch_size
        with torch.no_grad():
            logits.fill(
                lambda number: self.windows[number]["input_ids"],
                range(first, first + self.taught_steps * settings.batch_size),
                len(self.windows),
                lambda ids: teacher(ids.to(teacher.device), use_cache=False).logits,
                settings.batch_size,
            )
        return logits

    def _local(self, teacher: Any, progress: Callable[[int, int], None] | None) -> list[Row]:
        settings, size = self.settings, self.settings.batch_size
        batches = [
            torch.stack([self.windows[step * size + i]["input_ids"] for i in range(size)])
            for step in range(self.local_steps)
        ]
        return distill_blocks(
            self.model,
            teacher,
            batches,
            trained=self.trained,
            inputs=settings.distill.local_inputs,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            core_rate=settings.core_rate,
            autocast=torch.bfloat16 if self.dtype == "bfloat16" else None,
            folder=self.folder / "local",
            progress=lambda done: None if progress is None else progress(done, settings.steps),
        )

    def _global(
        self,
        dataset: TaughtWindows,
        teacher: Any,
        progress: Callable[[int, int], None] | None,
        judge: Judge | None,
    ) -> list[Row]:
        settings = self.settings
        watch = Watch(
            settings.batch_size * settings.window,
            progress,
            steps_before=self.local_steps,
            phase=lambda step: "kl" if step <= self.taught_steps else "lm",
            diverged=settings.diverged,
            judge=judge,
        )
        start = last_whole_checkpoint(self.folder) if self.folder.exists() else None
        if start is not None:
            watch.rows = read_json(start / MARK)["rows"]
        trainer = DistillTrainer(
            model=self.model,
            args=_arguments(settings, self.folder, self.dtype, self.seed, settings.steps - self.local_steps),
            train_dataset=dataset,
            callbacks=[watch] if self.patches is None else [watch, Turns(self.patches)],
            optimizers=self._optimizer(),
        )
        trainer.teacher, trainer.hidden = teacher, settings.distill.hidden
        trainer.remove_callback(PrinterCallback)  # the rows say it
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        return watch.rows

    def _optimizer(self) -> tuple[Any, Any]:
        """With its schedule; None where the Trainer's own are meant."""
        settings = self.settings
        if self.patches is not None:
            return self.patches.optimizer(
                settings.learning_rate, settings.warmup, settings.weight_decay, settings.steps
            )
        if settings.core_rate == "same":
            return None, None
        groups = parameter_groups(self.model, self.trained, settings.learning_rate, settings.core_rate)
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True), None
