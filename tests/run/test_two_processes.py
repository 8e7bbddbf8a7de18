"""Two real processes at one folder: one works, the other is refused or waits, and a killed one holds up nobody."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tensormix.recipe import Recipe, Sweep
from tensormix.recover.teacher import TeacherLogits
from tensormix.run import run_recipe
from tensormix.storage.files import read_json
from tensormix.sweep.depths import run_sweep

RECIPE: dict[str, Any] = {
    "plan": [{"blocks": "last 1", "method": {"name": "zero"}}],
    "evaluate": {"exam": {"num_questions": 4, "shots": 0}},
    "diagnose": None,
    "profile": None,
}
# The other process stops in the middle of its work, where it says so by a file, until it is killed or let go on.
HELD = """
import sys, time
from pathlib import Path
started, go = Path(sys.argv[1]), Path(sys.argv[1] + ".go")
def hold():
    started.touch()
    while not go.exists():
        time.sleep(0.01)
"""
RUN = """
from tensormix.recipe import Recipe
from tensormix.run import run_recipe, stages
def evaluate_rows(*args, **kwargs):
    hold()
stages.evaluate_rows = evaluate_rows
run_recipe(Recipe.model_validate_json(sys.argv[2]), Path(sys.argv[3]))
"""
SWEEP = """
from tensormix.recipe import Sweep
from tensormix.run import stages
from tensormix.sweep.depths import run_sweep
def evaluate_rows(*args, **kwargs):
    hold()
stages.evaluate_rows = evaluate_rows
run_sweep(Sweep.model_validate_json(sys.argv[2]), Path(sys.argv[3]))
"""
CACHE = """
import torch
from tensormix.recover.teacher import TeacherLogits
cache = TeacherLogits(Path(sys.argv[2]), teacher="t", tokenizer="k", vocabulary=5, top_k=2, tail_samples=0, window=3)
def logits(ids):
    hold()
    return torch.zeros(*ids.shape, 5)
cache.fill(lambda number: torch.tensor([0, 1, number]), range(2), 2, logits, 2)
"""


@contextmanager
def held(code: str, folder: Path, *words: str) -> Iterator[subprocess.Popen]:
    """A process that has come to `hold`; killed at the end."""
    started = folder / "started"
    process = subprocess.Popen([sys.executable, "-c", HELD + code, str(started), *words], stderr=subprocess.PIPE)
    try:
        while not started.exists():
            assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
            time.sleep(0.01)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_second_run_of_one_folder_is_refused_and_the_end_of_the_first_frees_it(tiny, tmp_path):
    recipe, folder = Recipe.model_validate(RECIPE | {"model": str(tiny)}), tmp_path / "run"
    with held(RUN, tmp_path, recipe.model_dump_json(), str(folder)):
        changed = recipe.model_copy(update={"seed": 5})
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
        with pytest.raises(ValueError, match=r"run is being written by another process; wait for it, or choose"):
            run_recipe(changed, folder)
        assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before
    run_recipe(recipe, folder)
    assert (folder / "evaluate.json").exists()


def test_a_second_sweep_of_one_folder_is_refused_and_so_is_a_run_of_its_cell(tiny, tmp_path):
    sweep = Sweep.model_validate({"recipe": RECIPE | {"model": str(tiny), "plan": []}, "vary": {"num_branches": [2]},
                                  "depths": [1]})  # fmt: skip
    folder = tmp_path / "sweep"
    with held(SWEEP, tmp_path, sweep.model_dump_json(), str(folder)):
        with pytest.raises(ValueError, match=r"sweep is being written by another process"):
            run_sweep(sweep, folder)
        with pytest.raises(ValueError, match=r"dense is being written by another process"):
            run_recipe(Recipe.model_validate(RECIPE | {"model": str(tiny), "plan": []}), folder / "dense")
    run_sweep(sweep, folder)
    assert read_json(folder / "sweep.json")["finished"]


def test_a_file_of_a_shared_teacher_cache_is_computed_by_one_and_used_by_both(tmp_path, caplog):
    folder, calls = tmp_path / "cache", []
    with held(CACHE, tmp_path, str(folder)), caplog.at_level(logging.WARNING):
        cache = TeacherLogits(folder, teacher="t", tokenizer="k", vocabulary=5, top_k=2, tail_samples=0, window=3)
        threading.Timer(0.5, (tmp_path / "started.go").touch).start()
        cache.fill(lambda number: torch.tensor([0, 1, number]), range(2), 2, calls.append, 2)  # type: ignore[arg-type]
    assert calls == [] and cache[1]["teacher_values"].shape == (2, 2)
    assert "waiting for another process, which is writing" in caplog.text and "logits-00000" in caplog.text


def test_a_killed_writer_of_a_cache_is_replaced_at_once(tmp_path):
    folder = tmp_path / "cache"
    with held(CACHE, tmp_path, str(folder)):
        pass
    cache = TeacherLogits(folder, teacher="t", tokenizer="k", vocabulary=5, top_k=2, tail_samples=0, window=3)
    cache.fill(lambda number: torch.tensor([0, 1, number]), range(2), 2, lambda ids: torch.zeros(*ids.shape, 5), 2)
    assert cache[0]["teacher_values"].shape == (2, 2)
