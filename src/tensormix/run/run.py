"""One recipe, one run folder: the only place that knows the order of the stages.

    recipe.json       what was asked
    allocate.json     of a recipe with a budget or a search: the plan that it became, with the size of every site
    compress.json     one file per finished stage: its rows, its settings, its key, where and when it was made
    recover.json  evaluate.json  diagnose.json  profile.json
    answers/          what benchmarks have answered while evaluate is not finished
    compressed/       the model after compress        recovered/   the model after recover
    compressed.journal.jsonl   what each file of compressed/ holds, and its SHA-256
    dense/            the run of the untouched model that the others are compared with

A stage is done when its file exists and carries the key of what was asked: the hash of its own settings and of all
that comes before it. So a run that was stopped goes on at the first stage that is missing, and a changed recipe
repeats what the change touches and nothing else.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tensormix.hf  # noqa: F401  (a compressed model must be loadable)
from tensormix import __version__
from tensormix.budget import allocate
from tensormix.budget.search import check_search, scorer, search_sites
from tensormix.diagnose.verdict import Verdict, exam_accuracy
from tensormix.evaluate import check_installed
from tensormix.examine import diagnose_rows, evaluate_rows, exam_prompts, has_answers, windows
from tensormix.models import fingerprint, load_model, load_tokenizer, quiet
from tensormix.plan import Plan
from tensormix.profile import profile
from tensormix.recipe import Recipe
from tensormix.recover import recover
from tensormix.settings import Calibration, Exam, Recover, Source
from tensormix.storage.files import environment, now, read_json, whole_folder, write_json
from tensormix.streaming.stream import compress_checkpoint

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all
STAGES = ("allocate", "compress", "recover", "evaluate", "diagnose", "profile")


def dense_recipe(recipe: Recipe) -> Recipe:
    """The same examination of the untouched model."""
    nothing = {"budget": None, "search": None, "start": None, "recover": None, "calibration": None, "profile": None}
    return recipe.model_copy(update={"plan": Plan(()), **nothing})


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    reference: Path | None = None,
    progress: Progress | None = None,
    keep_compressed: bool = True,
    workers: int = 1,
    teacher_cache: Path | None = None,
) -> Path:
    """Allocate, compress, recover, evaluate, diagnose, profile; returns `folder`. Finished stages are not repeated.

    Args:
        reference: the run folder of the untouched model; without it that run is made first, in `folder`/dense.
        progress: told how far each stage is.
        keep_compressed: keep the model as it was before recovery, too.
        workers: blocks that are compressed at a time, where no method needs inputs.
        teacher_cache: a folder for the dense model's logits, shared by the runs of a sweep; without it they are kept
            no longer than the recovery.

    Raises:
        ValueError: whatever a stage finds wrong with the recipe, the model or the data. Finished stages stay.
    """
    write_json(folder / "recipe.json", json.loads(recipe.model_dump_json()))
    if recipe.search is not None and with_allocation(recipe, folder) is None:
        check_search(recipe)  # before the dense model is measured
    if reference is None and len(recipe.plan.root):
        reference = run_recipe(dense_recipe(recipe), folder / "dense", progress=progress)
    if recipe.evaluate.benchmarks:
        check_installed()  # before hours of work, not after them
    tell = progress or (lambda stage, done, total: None)
    if recipe.is_open:
        _Run(recipe, folder, reference, tell, workers).finish("allocate")
        recipe = with_allocation(recipe, folder) or recipe
    run = _Run(recipe, folder, reference, tell, workers)
    run.cache = teacher_cache
    for stage in STAGES:
        run.finish(stage)
        if stage == "recover" and stage in run.keys and not keep_compressed:
            shutil.rmtree(folder / "compressed", ignore_errors=True)
            (folder / "compressed.journal.jsonl").unlink(missing_ok=True)
    return folder


def with_allocation(recipe: Recipe, folder: Path) -> Recipe | None:
    """A recipe with a budget or a search as the recipe with the plan that it became; None if that is not known yet."""
    if not recipe.is_open:
        return recipe
    if not is_done(folder, "allocate", {"allocate": allocation_key(recipe)}):
        return None
    plan = Plan.model_validate(read_json(folder / "allocate.json")["plan"])
    return recipe.model_copy(update={"plan": plan, "budget": None, "search": None})


class _Run:
    """The state of one run: which model is in memory, and which keys the stages have."""

    def __init__(self, recipe: Recipe, folder: Path, reference: Path | None, progress: Progress, workers: int) -> None:
        self.recipe, self.folder, self.reference, self.progress = recipe, folder, reference, progress
        self.workers = workers
        self.cache: Path | None = None
        self.keys = stage_keys(recipe, reference)
        self._beside: Row = {}  # what the file of a stage says beside its rows
        self._model: Any = None
        self._dense: Any = None
        self._tokenizer: Any = None

    def finish(self, stage: str) -> None:
        work: Callable[[], list[Row]] = getattr(self, f"_{stage}")
        if stage not in self.keys or is_done(self.folder, stage, self.keys):
            return
        began, self._beside = time.perf_counter(), {}
        self.progress(stage, 0, 1)
        rows = work()
        write_json(
            self.folder / f"{stage}.json",
            {
                "stage": stage,
                "key": self.keys[stage],
                "settings": _settings(self.recipe, stage),
                "seed": self.recipe.seed,
                **self._beside,
                "rows": rows,
                "environment": environment(),
                "seconds": round(time.perf_counter() - began, 3),
                "finished": now(),
            },
        )
        self.progress(stage, 1, 1)

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.recipe.model)
        return self._tokenizer

    @property
    def model_folder(self) -> str | Path:
        """Where the newest finished model of this run lies."""
        for stage, name in (("recover", "recovered"), ("compress", "compressed")):
            if stage in self.keys and is_done(self.folder, stage, self.keys):
                return self.folder / name
        return self.recipe.model

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self._load(self.model_folder)
        return self._model

    @property
    def is_changed(self) -> bool:
        """Whether the model is not the dense one."""
        return "compress" in self.keys or "recover" in self.keys

    @property
    def dense(self) -> Any:
        if self._dense is None:
            self._dense = self._load(self.recipe.model)
        return self._dense

    def _load(self, source: str | Path) -> Any:
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
        return windows(self.tokenizer, settings, self.recipe.seed)

    def _allocate(self) -> list[Row]:
        if self.recipe.search is not None:
            return self._search()
        budget, settings = self.recipe.budget, self._calibration
        assert budget is not None
        spill = self.folder / "activations"
        found = allocate(
            self.recipe.start or self.recipe.model,
            self.recipe.plan,
            budget,
            self._batches(),
            lambda done, total, _: self.progress("allocate", done, total),
            dtype=self.recipe.dtype,
            precision=getattr(torch, settings.precision),
            spill=spill if settings.spill else None,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        shutil.rmtree(spill, ignore_errors=True)
        self._beside = {"plan": found.plan.model_dump(mode="json")}
        return found.rows

    def _search(self) -> list[Row]:
        recipe = self.recipe
        assert recipe.search is not None
        score, scored_on = scorer(self.tokenizer, recipe.evaluate, recipe.search.part)
        found = search_sites(
            self.dense,
            recipe.plan,
            recipe.search,
            score,
            lambda done, total: self.progress("allocate", done, total),
        )
        self._beside = {
            "plan": found.plan.model_dump(mode="json"),
            "chosen": found.chosen,
            "scored_on": scored_on,
            "left_out": found.left_out,
        }
        return found.rows

    def _compress(self) -> list[Row]:
        recipe, settings, batches = self.recipe, self._calibration, self._batches()
        return compress_checkpoint(
            recipe.start or recipe.model,
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
            teacher=self.recipe.model,
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
        folders = {"dense": Path(self.recipe.model), "compressed": Path(self.model_folder)}
        rows = profile(models, folders, tokens=settings.tokens, repeats=settings.repeats)
        self._dense = None
        del models
        gc.collect()
        return rows


def _settings(recipe: Recipe, stage: str) -> Any:
    """What the recipe says to one stage, as plain data."""
    whole = json.loads(recipe.model_dump_json())
    if stage == "allocate" and recipe.search is not None:
        asked = whole["evaluate"]["exam"] or whole["evaluate"]["perplexity"][0]
        return {"scored_on": asked, **{name: whole[name] for name in ("model", "dtype", "plan", "search")}}
    if stage == "allocate":
        return {name: whole[name] for name in ("model", "dtype", "plan", "calibration", "budget")}
    if stage == "compress":
        return {name: whole[name] for name in ("model", "dtype", "plan", "calibration")}
    return whole[stage]


def allocation_key(recipe: Recipe) -> str:
    """The key of what a budget or a search becomes: a hash of it, of the plan, and of what both are decided on."""
    start = [__version__, fingerprint(recipe.start or recipe.model), recipe.dtype, recipe.seed]
    text = json.dumps(["allocate", _settings(recipe, "allocate"), start], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stage_keys(recipe: Recipe, reference: Path | None) -> dict[str, str]:
    """The key of every stage that the recipe asks for: a hash of its settings and of what it builds upon.

    Of a recipe with a budget or a search only "allocate" is known: the others are those of the recipe that it becomes.
    """
    if recipe.is_open:
        return {"allocate": allocation_key(recipe)}
    start = [__version__, fingerprint(recipe.model), recipe.dtype, recipe.seed]
    keys: dict[str, str] = {}

    def key(stage: str, *upon: Any) -> None:
        text = json.dumps([stage, _settings(recipe, stage), *upon], sort_keys=True)
        keys[stage] = hashlib.sha256(text.encode()).hexdigest()[:16]

    if len(recipe.plan.root):
        key("compress", start, *([fingerprint(recipe.start)] if recipe.start else []))
    if recipe.recover is not None:
        other = recipe.recover.distill.teacher if recipe.recover.loss != "lm" else None
        key("recover", start, keys.get("compress"), *([fingerprint(other)] if other else []))
    model = keys.get("recover", keys.get("compress"))
    key("evaluate", start, model)
    if recipe.diagnose is not None and (has_answers(recipe.evaluate) or recipe.diagnose.run):
        compared = read_json(reference / "diagnose.json")["key"] if reference else None
        key("diagnose", keys["evaluate"], compared)
    if recipe.profile is not None and model is not None:
        key("profile", start, model)
    return keys


def is_done(folder: Path, stage: str, keys: dict[str, str]) -> bool:
    """Whether a stage's file carries its key, and the model that it made is still there or no longer needed."""
    file = folder / f"{stage}.json"
    if not file.exists() or read_json(file)["key"] != keys[stage]:
        return False
    if stage == "compress":
        return (folder / "compressed").exists() or ("recover" in keys and is_done(folder, "recover", keys))
    return stage != "recover" or (folder / "recovered").exists()


def stage_rows(folder: Path, stage: str) -> list[Row]:
    return read_json(folder / f"{stage}.json")["rows"]
