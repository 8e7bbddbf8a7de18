"""Folders that real stages wrote on the tiny model, once for a whole session: what reads folders is tested on these.

Copy one before you change it (`shutil.copytree`).
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tensormix.recipe import Recipe, Sweep
from tensormix.recipe.comparison import Comparison
from tensormix.run import run_recipe
from tensormix.storage.files import write_text
from tensormix.sweep.compare import run_comparison
from tensormix.sweep.depths import run_sweep

TEXT = {"text": {"facts": True}, "window": 64, "stride": 64, "num_tokens": 128}
RECOVER = {"steps": 4, "batch_size": 1, "window": 32, "text": [{"exam": True}]}
EVALUATE = {"exam": {"num_questions": 8, "shots": 0}, "perplexity": [TEXT], "batch_size": 8}
DIAGNOSTICS = ("residual_stream", "spectra", "super_weights", "drop_sensitivity", "spectral_gap")
PAIRED = ("residual_stream", "compress_sensitivity")  # of a compressed model beside the dense one


def _benchmarks(folder: Path) -> list[dict[str, Any]]:
    """Two benchmarks of two choices, where lm-eval is there to ask them."""
    if find_spec("lm_eval") is None:
        return []
    sys.path.insert(0, str(Path(__file__).parent / "evaluate"))
    from benchmark_files import mmlu, write

    two = [{**doc, "choices": doc["choices"][:2], "gold": doc["gold"] // 2} for doc in mmlu(4)]
    files = [{"name": name, "file": write(folder / f"{name}.jsonl", two)} for name in ("piqa", "arc_challenge")]
    lettered = {"name": "mmlu", "file": write(folder / "mmlu.jsonl", mmlu(4)), "shots": 0}
    return [*files, lettered]


@pytest.fixture(scope="session")
def real_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage but a reparameterisation: a budget, all diagnostics, and benchmarks where lm-eval is."""
    folder = tmp_path_factory.mktemp("real_run")
    run = [*DIAGNOSTICS, {"name": "restoration", "num_ranks": 4, "num_entries": 4}]
    data = {
        "model": str(tiny),
        "plan": [{"blocks": "last 2", "method": {"name": "svd_llm"}}],
        "budget": {"keep": 0.5},
        "calibration": {"text": {"facts": True}, "num_windows": 2, "window": 32},
        "recover": RECOVER | {"loss": "local_then_kl", "distill": {"local_steps": 2}},
        "evaluate": EVALUATE | {"kl": True, "direct": True, "benchmarks": _benchmarks(folder)},
        "diagnose": {"num_prompts": 4, "run": run, "num_windows": 1, "window": 32},
        "profile": {"tokens": [1, 8], "repeats": 2},
    }
    return run_recipe(Recipe.model_validate(data), folder / "run")


@pytest.fixture(scope="session")
def real_sweep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MixT from both ends beside its baselines, and another dense model of the family."""
    folder = tmp_path_factory.mktemp("real_sweep")
    config = AutoConfig.from_pretrained(tiny)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "small")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, folder / "small")
    recipe = {
        "model": str(tiny),
        "recover": RECOVER,
        "evaluate": EVALUATE,
        "diagnose": {
            "num_prompts": 4,
            "run": [*PAIRED],
            "num_windows": 1,
            "window": 32,
        },
        "profile": {"tokens": [1], "repeats": 2},
    }
    data = {
        "recipe": recipe,
        "num_branches": [2],
        "directions": {"last": {"depths": "all"}, "first": {"depths": [2]}},
        "baselines": {"methods": ["zero", "drop_blocks"], "depths": [3]},
        "family": [str(folder / "small")],
    }
    return run_sweep(Sweep.model_validate(data), folder / "sweep")


@pytest.fixture(scope="session")
def real_comparison(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One method beside the null baselines, at a budget that all can meet and one that it cannot."""
    recipe = {
        "model": str(tiny),
        "calibration": {"text": {"facts": True}, "num_windows": 2, "window": 32},
        "evaluate": {"exam": None, "kl": True, "perplexity": [TEXT]},
        "diagnose": None,
        "profile": {"tokens": [1], "repeats": 2},
    }
    data = {"recipe": recipe, "methods": {"low": {"method": {"name": "svd"}}}, "budgets": [0.5, 0.01]}
    return run_comparison(Comparison.model_validate(data), tmp_path_factory.mktemp("real_comparison"))


@pytest.fixture(scope="session")
def real_unfinished_sweep(real_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, stopped while its fourth depth was recovered and before the other end was begun."""
    folder = tmp_path_factory.mktemp("real_unfinished") / "sweep"
    shutil.copytree(real_sweep, folder)
    for stage in ("recover", "evaluate", "diagnose", "profile"):
        (folder / "last-04-mixt2" / f"{stage}.json").unlink()
    shutil.rmtree(folder / "first-02-mixt2")
    text = (folder / "sweep.json").read_text(encoding="utf-8")
    write_text(folder / "sweep.json", text.replace('"finished": "', '"finished": null, "was": "'))
    return folder
