"""A recipe that rewrites the dense model before it is compressed: the stage, its key, what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tensormix.recipe import Recipe, Sweep
from tensormix.recipe.comparison import Comparison
from tensormix.run import run_recipe, stage_rows
from tensormix.storage.files import read_json

MIXT = {"blocks": "last 1", "method": {"name": "mixt", "num_branches": 2, "init": "aware"}}


def recipe(tiny, **changes):
    data = {
        "model": str(tiny),
        "plan": [MIXT],
        "calibration": {"text": {"exam": True}, "num_windows": 2, "window": 64},
        "reparameterise": {"steps": 8},
        "evaluate": {"exam": {"num_questions": 8, "shots": 0}},
        "diagnose": None,
        "profile": None,
    }
    return Recipe.model_validate(data | changes)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    return run_recipe(recipe(tiny), tmp_path_factory.mktemp("turned"))


def test_the_rewritten_model_is_what_is_compressed(finished, tiny, tmp_path):
    (row,) = stage_rows(finished, "reparameterise")
    assert len(row["sites"]) == 7 and row["error_after"] < row["error_before"] and 0 < row["logits_moved"] < 1e-3
    assert read_json(finished / "reparameterise.json")["settings"] == {"steps": 8}
    assert not (finished / "rewritten").exists() and (finished / "compressed").exists()
    assert not (finished / "dense" / "reparameterise.json").exists()
    plain = run_recipe(recipe(tiny, reparameterise=None), tmp_path, reference=finished / "dense")
    assert not (plain / "reparameterise.json").exists()
    errors = [[r["output_error"] for r in stage_rows(folder, "compress")] for folder in (finished, plain)]
    squares = [sum(error**2 for error in of_run) / 7 for of_run in errors]
    assert squares[0] ** 0.5 <= 1.01 * row["error_after"], "a new fit is the optimum in these bases"
    assert squares[1] ** 0.5 == pytest.approx(row["error_before"], rel=0.02)


def test_nothing_is_done_twice_and_a_change_repeats_it(finished, tiny):
    file = finished / "reparameterise.json"
    before, calls = file.stat().st_mtime_ns, stage_rows(finished, "reparameterise")[0]["error_calls"]
    run_recipe(recipe(tiny), finished)
    assert file.stat().st_mtime_ns == before
    run_recipe(recipe(tiny, reparameterise={"steps": 2}), finished)
    (row,) = stage_rows(finished, "reparameterise")
    assert file.stat().st_mtime_ns != before and row["error_calls"] < calls


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": "elsewhere"}, r"reparameterise rewrites the dense model: leave out start"),
        ({"calibration": None, "plan": []}, r"reparameterise learns on calibration text, and there is no such section"),
        ({"dtype": "bfloat16"}, r"which dtype bfloat16 would round too coarsely: give float32 or float64"),
        (
            {"plan": [{"blocks": 1, "method": {"name": "drop_blocks"}}, {"method": {"name": "zero"}}]},
            r"such as mixt, and the plan has drop_blocks, zero",
        ),
        (
            {"recover": {"steps": 2, "text": [{"exam": True}], "loss": "local_then_kl", "distill": {"local_steps": 1}}},
            r"turns the hidden states, so those of the dense model cannot be learned from: give recover the loss",
        ),
        (
            {"recover": {"steps": 1, "text": [{"exam": True}], "loss": "kl", "distill": {"hidden": 0.5}}},
            r"cannot be learned from: .*, and no distill\.hidden",
        ),
        (
            {"diagnose": {"run": ["residual_stream"]}},
            r"so residual_stream would compare two bases: leave it out of diagnose\.run",
        ),
        ({"plan": [{"method": {"name": "rtn", "bits": 4}}]}, r"such as mixt, and the plan has rtn"),
        ({"reparameterise": {"steps": 0}}, r"greater than or equal to 1"),
        ({"reparameterise": {"step": 3}}, r"step"),
    ],
)
def test_what_is_refused(tiny, changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        recipe(tiny, **changes)


def test_a_warm_start_is_refused(tiny):
    with pytest.raises(
        ValidationError, match="warm_start goes on from a recovered model and reparameterise from the dense"
    ):
        Sweep.model_validate({"recipe": recipe(tiny, plan=[]), "warm_start": True})


def test_a_comparison_turns_only_what_gains_by_it(tiny):
    asked = {
        "recipe": recipe(tiny, plan=[]),
        "budgets": [0.5],
        "methods": {n: {"method": {"name": n}} for n in ("svd", "flat_llm")},
    }
    comparison = Comparison.model_validate(asked)
    turned = {cell.method: comparison.recipe_of(cell).is_turned for cell in comparison.cells()}
    assert turned.pop("svd") and len(turned) == 4 and not any(turned.values())


def test_what_was_thrown_away_is_turned_again_to_be_evaluated_directly(tiny, tmp_path):
    learned = {"recover": {"steps": 1, "text": [{"exam": True}], "window": 64, "batch_size": 2}}
    first = run_recipe(recipe(tiny, **learned), tmp_path, keep_compressed=False)
    assert not (first / "compressed").exists()
    direct = {"evaluate": {"exam": {"num_questions": 8, "shots": 0}, "direct": True}}
    run_recipe(recipe(tiny, **learned, **direct), tmp_path, keep_compressed=False)
    assert any(row["kind"] == "size" for row in stage_rows(tmp_path, "direct"))


def test_the_null_baselines_of_a_sweep_are_left_as_they_are(tiny):
    """Their plans have nothing that bases are learned for."""
    asked = recipe(tiny)
    zeroed = asked.model_copy(
        update={"plan": recipe(tiny, reparameterise=None, plan=[{"method": {"name": "zero"}}]).plan}
    )
    assert asked.is_turned and not zeroed.is_turned
