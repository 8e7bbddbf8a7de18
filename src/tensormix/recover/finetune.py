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
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PrinterCallback

from tensormix.data import Mixture
from tensormix.models import ModelSource
from tensormix.recover.first_step import NUM_BATCHES, largest_rate, loss_per_rate, warning
from tensormix.recover.held_out import Judgements, judged_steps, judged_windows, taught
from tensormix.recover.local import distill_blocks, learning_blocks
from tensormix.recover.lora import Patches, Turns, patched
from tensormix.recover.optimizing import optimizer_of, trained_parameters
from tensormix.recover.rates import parameter_groups
from tensormix.recover.teacher import TeacherLogits, open_teacher, tokenizer_digest
from tensormix.recover.trainer import DistillTrainer, TaughtWindows, arguments, batch_loss
from tensormix.recover.watch import MARK, Row, Watch, last_whole_checkpoint
from tensormix.settings import Recover
from tensormix.storage.files import read_json

RATE = 1e-3  # where nothing can be learned, so that no rate is too high
Judge = Callable[[Any, int], bool]


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
    """Train `model` in place for exactly `settings.steps` steps and keep its best state; returns the losses as rows.

    It is judged on held-out windows at the start, at intervals and at the end. The last row says which state was kept,
    and in a sentence if that is not the last one.

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
            trained = trained_parameters(model, settings, patches)
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


def _checkpointing(model: Any, action: str) -> Callable[..., None]:
    """The model's method, which transformers renamed on the way to version 6."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    return getattr(model, f"{kind}_checkpointing_{action}")


class _Recovery:
    """One recovery: how its windows are shared between the phases."""

    patches: Patches | None = None
    rate: float

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
            num_windows=settings.steps * settings.windows_per_step,
            seed=seed,
            answers_only=settings.loss_on == "answers",
            num_held_out=settings.held_out.num_windows,
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
        distill = self.settings.distill
        if self.settings.loss != "lm":
            teacher, source = open_teacher(distill.teacher or teacher_source, self.model, self.tokenizer)
            if distill.top_k != "all":
                logits = self._logits(teacher, source, cache)
        judgements = self._judgements(teacher)
        judgements.judge(self.model, 0)
        dataset = TaughtWindows(
            self.windows,
            logits,
            first=self.local_steps * self.settings.windows_per_step,
            num_taught=self.taught_steps * self.settings.windows_per_step,
        )
        beside = teacher if distill.hidden or distill.top_k == "all" else None
        rows.append(self._choose_rate(dataset, beside))
        rows += self._local(teacher, progress) if self.local_steps else []
        rows += self._global(dataset, beside, judgements, progress, judge)
        return rows + judgements.finish(self.model)

    def _choose_rate(self, dataset: TaughtWindows, teacher: Any) -> Row:
        """Settle `rate` before anything is changed; the row says what its first step promises."""
        asked, size = self.settings.learning_rate, self.settings.batch_size
        if self.settings.gradient == "zeroth_order":
            assert asked != "auto"  # the settings see to it
            self.rate = asked
            return {"kind": "rate", "learning_rate": asked, "promised": None, "said": None}
        groups = parameter_groups(self.model, self.trained, 1.0, self.settings.core_rate)
        factors = {parameter: group["lr"] for group in groups for parameter in group["params"]}
        device = next(iter(self.trained)).device

        def loss(number: int) -> Tensor:
            batch = default_collate([dataset[number * size + place] for place in range(size)])
            batch = {key: value.to(device) for key, value in batch.items()}
            return batch_loss(self.model, batch, teacher, self.settings.distill.hidden)[0]

        num_batches = min(NUM_BATCHES if asked == "auto" else 1, len(dataset) // size)
        training = self.model.training
        self.model.train()  # blocks are computed again only then, where that is asked for
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            per_rate = loss_per_rate(factors, map(loss, range(num_batches)))
        self.model.train(training)
        self.rate = largest_rate(per_rate, RATE) if asked == "auto" else float(asked)
        promised = self.rate / per_rate if per_rate else None
        return {"kind": "rate", "learning_rate": self.rate, "promised": promised, "said": warning(self.rate, per_rate)}

    def _judgements(self, teacher: Any) -> Judgements:
        """By the loss of the last phase; with the state that an earlier, stopped call found best."""
        settings, windows = self.settings, judged_windows(self.windows, self.settings)
        return Judgements(
            taught(windows, teacher) if self.task_steps == 0 else windows,
            {name: p for name, p in self.model.named_parameters() if p in self.trained},
            self.folder / "best.safetensors",
            num_own=len(self.windows.held_out) if len(windows) > len(self.windows.held_out) else None,
            at=judged_steps(settings.steps, settings.held_out.num_times),
            steps_before=self.local_steps,
            batch_size=settings.batch_size,
            autocast=torch.bfloat16 if self.dtype == "bfloat16" else None,
        )

    def _logits(self, teacher: Any, source: ModelSource, cache: Path | None) -> TeacherLogits:
        """Filled for the steps that learn from them."""
        settings = self.settings
        about: dict[str, Any] = settings.distill.model_dump(include={"top_k", "tail_samples"}) | {
            "teacher": source.fingerprint,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "vocabulary": teacher.get_output_embeddings().weight.shape[0],
            "window": settings.window,
        }
        read = settings.model_dump(mode="json", include={"text", "loss_on", "held_out"})  # what settles the windows
        name = hashlib.sha256(json.dumps([about, self.seed, read], sort_keys=True).encode()).hexdigest()[:16]
        own = settings.distill.cache
        logits = TeacherLogits(Path(own) if own is not None else (cache or self.folder / "teacher") / name, **about)
        first = self.local_steps * settings.windows_per_step
        with torch.no_grad():
            logits.fill(
                lambda number: self.windows[number]["input_ids"],
                range(first, first + self.taught_steps * settings.windows_per_step),
                len(self.windows),
                lambda ids: teacher(ids.to(teacher.device), use_cache=False).logits,
                settings.batch_size,
            )
        return logits

    def _local(self, teacher: Any, progress: Callable[[int, int], None] | None) -> list[Row]:
        settings, size = self.settings, self.settings.windows_per_step
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
            learning_rate=self.rate,
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
        judgements: Judgements,
        progress: Callable[[int, int], None] | None,
        judge: Judge | None,
    ) -> list[Row]:
        settings = self.settings
        watch = Watch(
            settings.windows_per_step * settings.window,
            progress,
            steps_before=self.local_steps,
            phase=lambda step: "kl" if step <= self.taught_steps else "lm",
            diverged=settings.diverged,
            judge=judge,
            held_out=judgements.rows,
        )
        start = last_whole_checkpoint(self.folder) if self.folder.exists() else None
        if start is not None:
            watch.rows = read_json(start / MARK)["rows"]
            judgements.rows[:] = read_json(start / MARK)["held_out"]
        optimizers = optimizer_of(self.model, settings, self.trained, self.patches, self.rate, self.seed)
        trainer = DistillTrainer(
            model=self.model,
            args=arguments(settings, self.folder, self.dtype, self.seed, settings.steps - self.local_steps, self.rate),
            train_dataset=dataset,
            callbacks=[judgements, watch] if self.patches is None else [judgements, watch, Turns(self.patches)],
            optimizers=optimizers,
        )
        trainer.teacher, trainer.hidden = teacher, settings.distill.hidden
        trainer.descent = optimizers[0] if settings.gradient == "zeroth_order" else None
        trainer.remove_callback(PrinterCallback)  # the rows say it
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        return watch.rows
