"""Every row that a real stage writes has exactly the keys that `tensormix.rows` says it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from real_runs import EVALUATE, RECOVER
from tensormix.models import load_model, load_tokenizer
from tensormix.recipe import Recipe, Sweep
from tensormix.rows import ROWS, STAGES
from tensormix.run import run_recipe
from tensormix.storage.files import read_json
from tensormix.sweep.predict import predict


def kinds_of(row_type: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(row_type)["kind"]) if "kind" in get_type_hints(row_type) else ("",)


def check(rows: list[dict[str, Any]], where: str) -> set[str]:
    """The kinds that were there."""
    known = {kind: row_type for row_type in ROWS[where] for kind in kinds_of(row_type)}
    for row in rows:
        kind = row.get("kind", "")
        assert kind in known, f"{where} writes rows of kind {kind!r}, which tensormix.rows does not know there"
        missing, more = known[kind].__required_keys__ - set(row), set(row) - set(known[kind].__annotations__)
        assert not missing and not more, f"{where}, {kind!r}: missing {sorted(missing)}, unknown {sorted(more)}"
    return {row.get("kind", "") for row in rows}


def check_stages(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for stage in STAGES:
        for file in folder.rglob(f"{stage}.json"):
            found.setdefault(stage, set()).update(check(read_json(file)["rows"], stage))
    return found


def test_rows_of_one_stage_can_be_told_apart() -> None:
    for types in ROWS.values():
        kinds = [kind for row_type in types for kind in kinds_of(row_type)]
        assert len(set(kinds)) == len(kinds)
    assert set(STAGES) <= set(ROWS)


def test_a_run(real_run: Path) -> None:
    found = check_stages(real_run)
    assert set(found) == set(STAGES) - {"reparameterise"}
    for stage in ("evaluate", "direct", "diagnose", "profile"):
        rare = {"no_entropy", "left_out", "super_weight"}  # none of these on the tiny model
        benchmarks = {"macro_accuracy", "macro_drop"}  # with lm-eval
        missing = {kind for row_type in ROWS[stage] for kind in kinds_of(row_type)} - found[stage]
        assert missing <= rare | benchmarks, f"{stage}: no row of kind {sorted(missing)}"


def test_a_sweep(real_sweep: Path) -> None:
    check_stages(real_sweep)
    content = read_json(real_sweep / "sweep.json")
    check(content["cells"], "cells")
    found = check(content["boundary"], "boundary")
    assert found == {kind for row_type in ROWS["boundary"] for kind in kinds_of(row_type)}


def test_a_comparison(real_comparison: Path) -> None:
    check_stages(real_comparison)
    check(read_json(real_comparison / "comparison.json")["cells"], "comparison")


@pytest.mark.parametrize(
    "changes",
    [
        {"reparameterise": {"steps": 2}, "plan": [{"blocks": 3, "method": {"name": "mixt", "num_branches": 2,
                                                                          "init": "aware"}}]},
        {"plan": [{"sites": ["down"], "blocks": 3, "method": {"name": "laser"}}], "search": {"keep_rank": [0.5]}},
        {"plan": [{"method": {"name": "streamline", "count": 1}}]},
        {"plan": [{"method": {"name": "drop_blocks", "choose": "angular", "count": 1}}],
         "recover": RECOVER | {"save_every": 1, "early_stop": {"threshold": 0.01, "num_questions": 8}}},
    ],
)  # fmt: skip
def test_rarer_stages(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = load_model(tiny, dtype="float32")
    with torch.no_grad():  # that of BOS is zero: a state without a direction, by which blocks cannot be chosen
        model.get_input_embeddings().weight[0] = 0.1
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(tiny).save_pretrained(tmp_path / "model")
    calibration = {"text": {"facts": True}, "num_windows": 2, "window": 32}
    data = {
        "model": str(tmp_path / "model"),
        "calibration": calibration,
        "evaluate": EVALUATE,
        "diagnose": None,
        "profile": None,
    }
    check_stages(run_recipe(Recipe.model_validate(data | changes), tmp_path / "run"))


def test_a_prediction(tiny: Path) -> None:
    recipe = {"model": str(tiny), "evaluate": EVALUATE, "recover": RECOVER}
    rows = predict(Sweep.model_validate({"recipe": recipe, "num_branches": [2]}), num_prompts=4, local_tokens=128)
    assert check(rows, "predict") == {"signal", "prediction"}
