"""One recipe, one run folder: the only place that knows the order of the stages.

    recipe.json       what was asked
    allocate.json     of a recipe with a budget or a search: the plan that it became, with the size of every site
    reparameterise.json   of a recipe that asks for it: what the learned bases won
    compress.json     one file per finished stage: its rows, its settings, its key, where and when it was made
    direct.json       what evaluate measures, of the model before its recovery, where that is asked for
    recover.json  evaluate.json  diagnose.json  profile.json
    answers/          what benchmarks have answered while evaluate is not finished
    rewritten/        the dense model in other bases, until it is compressed
    compressed/       the model after compress        recovered/   the model after recover
    compressed.journal.jsonl   what each file of compressed/ holds, and its SHA-256
    dense/            the run of the untouched model that the others are compared with
    .lock             held by the process that writes into the folder

A stage is done when its file exists and carries the key of what was asked: the hash of its own settings and of all
that comes before it. So a run that was stopped goes on at the first stage that is missing, and a changed recipe
repeats what the change touches and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tensormix.allocation.laser_search import check_search
from tensormix.evaluate import check_installed
from tensormix.models import Sources, skeleton
from tensormix.recipe import Recipe
from tensormix.rows import STAGES, StageProgress
from tensormix.run.check import notes_of
from tensormix.run.keys import dense_recipe, with_allocation
from tensormix.run.stages import Stages
from tensormix.storage.files import remove_unfinished, write_json
from tensormix.storage.locks import only_process


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    reference: Path | None = None,
    progress: StageProgress | None = None,
    keep_compressed: bool = True,
    workers: int = 1,
    teacher_cache: Path | None = None,
    sources: Sources | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Every stage that the recipe asks for, in the order of STAGES; returns `folder`. Finished stages are not repeated.

    Args:
        reference: the run folder of the untouched model; without it that run is made first, in `folder`/dense.
        progress: told how far each stage is.
        keep_compressed: keep the model as it was before recovery, too.
        workers: blocks that are compressed at a time, where no method needs inputs.
        teacher_cache: a folder for the dense model's logits, shared by the runs of a sweep; without it they are kept
            no longer than the recovery.
        sources: the dense models that are open already; runs that share them read each of them once for their keys.
        say: called with one line about what stays dense since it is not known how it is multiplied, and the like, and
            about each text that a stage reads: documents, tokens, fields, chat template. Those of texts stand in the
            file of the stage, too, as "texts".

    Raises:
        ValueError: another process writes into the folder, or whatever a stage finds wrong with the recipe, the model
            or the data. Finished stages stay.
    """
    with only_process(folder):
        remove_unfinished(folder)
        write_json(folder / "recipe.json", json.loads(recipe.model_dump_json()))
        _carry_out(
            recipe, folder, reference, progress, keep_compressed, workers, teacher_cache, sources or Sources(), say
        )
    return folder


def _carry_out(
    recipe: Recipe,
    folder: Path,
    reference: Path | None,
    progress: StageProgress | None,
    keep_compressed: bool,
    workers: int,
    teacher_cache: Path | None,
    sources: Sources,
    say: Callable[[str], None] | None,
) -> None:
    if recipe.search is not None and with_allocation(recipe, folder, sources) is None:
        check_search(recipe)  # before the dense model is measured
    if reference is None and len(recipe.plan.root):
        reference = run_recipe(dense_recipe(recipe), folder / "dense", progress=progress, sources=sources, say=say)
    if recipe.evaluate.benchmarks:
        check_installed()  # before hours of work, not after them
    if say is not None and len(recipe.plan.root):
        for line in notes_of(recipe, sources[recipe.model], skeleton(sources[recipe.model])):
            say(line)
    tell = progress or (lambda stage, done, total: None)
    if recipe.is_open:
        Stages(recipe, folder, reference, tell, workers, sources, say).finish("allocate")
        recipe = with_allocation(recipe, folder, sources) or recipe
    run = Stages(recipe, folder, reference, tell, workers, sources, say)
    run.cache = teacher_cache
    for stage in STAGES:
        run.finish(stage)
        if stage == "recover" and stage in run.keys and not keep_compressed:
            shutil.rmtree(folder / "compressed", ignore_errors=True)
            (folder / "compressed.journal.jsonl").unlink(missing_ok=True)
