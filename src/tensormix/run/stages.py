"""The work of every stage of one run, and the models that stages hand on."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tensormix.hf  # noqa: F401  (a compressed model must be loadable)
from tensormix.allocation.growth import growth_of
from tensormix.allocation.resolvers import Data, resolve
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.data import understood_by, windows_of
from tensormix.diagnose.verdict import Verdict, exam_accuracy
from tensormix.evaluate import exam_prompts, macro_drop_row
from tensormix.evaluate.forward import dtype_of
from tensormix.models import ModelSource, Sources, load_model, load_tokenizer, quiet
from tensormix.profile import bytes_by_dtype, num_parameters, profile
from tensormix.recipe import Recipe
from tensormix.recover import recover
from tensormix.reparameterise import reparameterise
from tensormix.rows import Row, StageProgress
from tensormix.run.keys import is_done, stage_keys, stage_rows, stage_settings
from tensormix.run.measuring import diagnose_rows, evaluate_rows
from tensormix.settings import Calibration, Exam, Recover, Source
from tensormix.storage.files import environment, now, whole_folder, write_json


class Stages:
    """The state of one run: which model is in memory, and which keys the stages have."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        reference: Path | None,
        progress: StageProgress,
        workers: int,
        sources: Sources | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.say = say
        self.recipe, self.folder, self.reference, self.progress = recipe, folder, reference, progress
        self.workers = workers
        self.cache: Path | None = None
        self.sources = sources or Sources()
        self.keys = stage_keys(recipe, reference, self.sources)
        self._beside: Row = {}  # what the file of a stage says beside its rows
        self._texts: list[str] = []  # what was understood of each text that the stage read
        self._model: Any = None
        self._dense: Any = None
        self._tokenizer: Any = None

    def finish(self, stage: str) -> None:
        work: Callable[[], list[Row]] = getattr(self, f"_{stage}")
        if stage not in self.keys or is_done(self.folder, stage, self.keys):
            return
        began, self._beside, self._texts = time.perf_counter(), {}, []
        self.progress(stage, 0, 1)
        with understood_by(self._note_text):
            rows = work()
        write_json(
            self.folder / f"{stage}.json",
            {
                "stage": stage,
                "key": self.keys[stage],
                "settings": stage_settings(self.recipe, stage),
                "seed": self.recipe.seed,
                **self._beside,
                "texts": self._texts,
                "rows": rows,
                "environment": environment(),
                "seconds": round(time.perf_counter() - began, 3),
                "finished": now(),
            },
        )
        self.progress(stage, 1, 1)

    def _note_text(self, line: str) -> None:
        if line not in self._texts:
            self._texts.append(line)
            if self.say is not None:
                self.say(line)

    @property
    def source(self) -> ModelSource:
        """The dense model's."""
        return self.sources[self.recipe.model]

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source)
        return self._tokenizer

    @property
    def model_source(self) -> ModelSource:
        """Where the newest finished model of this run lies."""
        for stage, name in (("recover", "recovered"), ("compress", "compressed")):
            if stage in self.keys and is_done(self.folder, stage, self.keys):
                return ModelSource(self.folder / name)
        return self.source

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self._load(self.model_source)
        return self._model

    @property
    def is_changed(self) -> bool:
        """Whether the model is not the dense one."""
        return "compress" in self.keys or "recover" in self.keys

    @property
    def dense(self) -> Any:
        if self._dense is None:
            self._dense = self._load(self.source)
        return self._dense

    def _load(self, source: ModelSource | Path) -> Any:
        model: Any = load_model(source, dtype=self.recipe.dtype)
        return model.to("cuda") if torch.cuda.is_available() else model

    def _save(self, name: str) -> None:
        with whole_folder(self.folder / name) as part, quiet():
            self.model.save_pretrained(part)
            self.tokenizer.save_pretrained(part)

    @property
    def _calibration(self) -> Calibration:
        return self.recipe.calibration or Calibration(text=Source(exam=True))  # the defaults, where nothing is asked

    def _batches(self) -> Any:
        settings = self.recipe.calibration
        if settings is None:
            return None
        return windows_of(self.tokenizer, settings, self.recipe.seed)

    def _allocate(self) -> list[Row]:
        spill = self.folder / "activations"
        data = Data(
            source=self.source,
            batches=self._batches,
            tokenizer=lambda: self.tokenizer,
            dense=lambda: self.dense,
            progress=lambda done, total: self.progress("allocate", done, total),
            spill=spill,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        found = resolve(self.recipe, data)
        shutil.rmtree(spill, ignore_errors=True)
        self._beside = {"plan": found.plan.model_dump(mode="json"), **found.beside}
        return found.rows

    def _reparameterise(self) -> list[Row]:
        settings = self.recipe.reparameterise
        assert settings is not None
        self._model = self._load(self.source)
        rows = reparameterise(
            self._model,
            self.recipe.plan,
            list(self._batches()),
            steps=settings.steps,
            progress=lambda done, total: self.progress("reparameterise", done, total),
        )
        self._save("rewritten")
        self._model = None
        return rows

    def _compress(self) -> list[Row]:
        recipe, settings, batches = self.recipe, self._calibration, self._batches()
        if recipe.is_turned and not (self.folder / "rewritten").exists():  # compressing anew, to evaluate it directly
            self._reparameterise()
        rows = compress_checkpoint(
            self.folder / "rewritten" if recipe.is_turned else recipe.start or self.source,
            self.folder / "compressed",
            recipe.plan,
            batches,
            lambda done, total, _: self.progress("compress", done, total),
            dtype=recipe.dtype,
            inputs=settings.inputs,
            precision=getattr(torch, settings.precision),
            spill=settings.spill,
            workers=self.workers,
            device="cuda" if torch.cuda.is_available() else "cpu",
            asked=self.keys["compress"],
            overwrite=True,  # it lies in the run's own folder
        )
        shutil.rmtree(self.folder / "rewritten", ignore_errors=True)
        larger = growth_of(rows)
        self._beside = {"larger": larger} if larger else {}
        return rows

    def _direct(self) -> list[Row]:
        if not (self.folder / "compressed").exists():  # thrown away after a recovery that came before the question
            self._compress()
        model = self._load(self.folder / "compressed")
        rows = evaluate_rows(
            model,
            self.tokenizer,
            self.recipe.evaluate,
            dense=lambda: self.dense,
            journals=self.folder / "answers" / self.keys["direct"],
            progress=lambda done, total: self.progress("direct", done, total),
        )
        shutil.rmtree(self.folder / "answers" / self.keys["direct"], ignore_errors=True)
        self._dense = None  # recovery needs the room
        size = {"kind": "size", "dtype": dtype_of(model), "parameters": num_parameters(model)}
        answers = stage_rows(self.reference, "evaluate") if self.reference else ()
        return [*rows, *macro_drop_row(rows, answers), {**size, "bytes": bytes_by_dtype(model)}]

    def _recover(self) -> list[Row]:
        assert self.recipe.recover is not None
        verdict = self._verdict(self.recipe.recover)
        rows = recover(
            self.model,
            self.tokenizer,
            self.recipe.recover,
            folder=self.folder / "checkpoints" / self.keys["recover"],
            seed=self.recipe.seed,
            progress=lambda done, total: self.progress("recover", done, total),
            teacher=self.source,
            cache=self.cache,
            judge=verdict,
        )
        self._save("recovered")
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return rows + (verdict.rows if verdict else [])

    def _verdict(self, settings: Recover) -> Verdict | None:
        stop = settings.early_stop
        if stop is None:
            return None
        if stop.threshold is None:
            raise ValueError(
                "recover: early_stop needs a threshold of accuracy, which only a sweep that bisects knows."
            )
        asked = (self.recipe.evaluate.exam or Exam()).model_copy(update={"num_questions": stop.num_questions})
        ask = exam_accuracy(self.tokenizer, exam_prompts(asked), self.recipe.evaluate.batch_size)
        return Verdict(ask, threshold=stop.threshold, num_steps=settings.steps)

    def _evaluate(self) -> list[Row]:
        rows = evaluate_rows(
            self.model,
            self.tokenizer,
            self.recipe.evaluate,
            dense=(lambda: self.dense) if self.is_changed else None,
            journals=self.folder / "answers" / self.keys["evaluate"],
            progress=lambda done, total: self.progress("evaluate", done, total),
        )
        shutil.rmtree(self.folder / "answers", ignore_errors=True)
        return rows

    def _diagnose(self) -> list[Row]:
        return diagnose_rows(
            self.model,
            self.tokenizer,
            self.recipe,
            stage_rows(self.folder, "evaluate"),
            reference_rows=stage_rows(self.reference, "diagnose") if self.reference else None,
            reference_answers=stage_rows(self.reference, "evaluate") if self.reference else None,
            dense=lambda: self.dense,
            progress=lambda done, total: self.progress("diagnose", done, total),
        )

    def _profile(self) -> list[Row]:
        settings = self.recipe.profile
        assert settings is not None
        models = {"dense": self.dense, "compressed": self.model}
        sources = {"dense": self.source, "compressed": self.model_source}
        rows = profile(models, sources, tokens=settings.tokens, repeats=settings.repeats)
        self._dense = None
        del models
        gc.collect()
        return rows
