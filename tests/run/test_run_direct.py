"""A run with `evaluate.direct`: the compressed model is measured before its recovery, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensormix.data import packed_source
from tensormix.evaluate import perplexity
from tensormix.models import load_model, load_tokenizer
from tensormix.profile import bytes_by_dtype
from tensormix.recipe import Recipe
from tensormix.run import run_recipe, stage_keys, stage_rows
from tensormix.settings import Source


def recipe(tiny: Path, **evaluate: Any) -> Recipe:
    text = {"facts": True, "num_documents": 4}
    return Recipe.model_validate(
        {
            "model": str(tiny),
            "plan": [{"blocks": "last 2", "method": {"name": "svd", "keep": 0.3}}],
            "recover": {"steps": 3, "batch_size": 2, "window": 32, "text": [{"exam": True}], "parameters": "lora"},
            "evaluate": {
                "exam": None,
                "perplexity": [{"text": text, "window": 64, "stride": 64, "domain": "held_out"}],
                **evaluate,
            },
            "diagnose": None,
            "profile": None,
        }
    )


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(recipe(tiny, direct=True), tmp_path_factory.mktemp("direct") / "run")


def test_what_is_measured_before_recovery_is_the_compressed_model(folder: Path, tiny: Path) -> None:
    rows = {row["kind"]: row for row in stage_rows(folder, "direct")}
    model = load_model(folder / "compressed", dtype="float32")
    ids = packed_source(load_tokenizer(tiny), Source(facts=True, num_documents=4))
    alone = perplexity(model, ids, window=64, stride=64, text="facts", bos_id=0)
    assert rows["perplexity"]["value"] == pytest.approx(alone["value"], rel=1e-5)
    assert rows["size"]["bytes"] == bytes_by_dtype(model)
    (after,) = [row for row in stage_rows(folder, "evaluate") if row["kind"] == "perplexity"]
    assert after["value"] != rows["perplexity"]["value"] and after["num_tokens"] == rows["perplexity"]["num_tokens"]
    assert after["domain"] == rows["perplexity"]["domain"] == "held_out"
    assert not (folder / "dense/direct.json").exists()  # nothing is compressed there
    assert not (folder / "answers").exists()


def test_it_can_be_asked_afterwards(folder: Path, tiny: Path, tmp_path: Path) -> None:
    """Nothing else is repeated; a compressed model that was thrown away is made again, not the recovered one read."""
    plain = run_recipe(recipe(tiny), tmp_path / "run", reference=folder / "dense", keep_compressed=False)
    assert not (plain / "direct.json").exists() and not (plain / "compressed").exists()
    before = {name: (plain / f"{name}.json").stat().st_mtime_ns for name in ("compress", "recover", "evaluate")}
    run_recipe(recipe(tiny, direct=True), plain, reference=folder / "dense", keep_compressed=False)
    assert {name: (plain / f"{name}.json").stat().st_mtime_ns for name in before} == before
    values = [row["value"] for part in (plain, folder) for row in stage_rows(part, "direct") if "value" in row]
    assert len(values) == 2 and values[0] == pytest.approx(values[1], rel=1e-6)
    assert not (plain / "compressed").exists()


def test_it_changes_no_other_key(tiny: Path, folder: Path) -> None:
    """Nor does the number of questions that are read at a time."""
    keys = [stage_keys(recipe(tiny, **more), folder / "dense") for more in ({}, {"direct": True}, {"batch_size": 3})]
    assert "direct" not in keys[0] and keys[1].pop("direct") and keys[0] == keys[1] == keys[2]
    assert stage_keys(recipe(tiny, kl=True), folder / "dense")["evaluate"] != keys[0]["evaluate"]
