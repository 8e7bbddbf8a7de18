"""A comparison makes every method at every budget once, the null baselines among them, and says what was missed."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from tensormix.models import source
from tensormix.recipe.comparison import Comparison
from tensormix.report import build_report
from tensormix.run import stage_rows
from tensormix.storage.files import read_json
from tensormix.sweep.compare import comparison_rows, run_comparison


def comparison(tiny, **changes):
    recipe = {
        "model": str(tiny),
        "calibration": {"text": {"facts": True}, "num_windows": 2, "window": 32},
        "recover": {"steps": 2, "batch_size": 1, "window": 32, "text": [{"facts": True}]},
        "evaluate": {
            "exam": None,
            "kl": True,
            "perplexity": [{"text": {"facts": True}, "window": 64, "stride": 64, "num_tokens": 128}],
        },
        "diagnose": None,
        "profile": {"tokens": [1], "repeats": 2},
    }
    data = {"recipe": recipe, "methods": {"low": {"method": {"name": "svd"}}}, "budgets": [0.5]}
    return Comparison.model_validate(data | changes)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    run_comparison(comparison(tiny, budgets=[0.5, 0.01]), folder)
    return folder


def test_every_cell_has_its_folder_and_the_null_baselines_are_always_there(finished):
    cells = {row["cell"]: row for row in read_json(finished / "comparison.json")["cells"]}
    labels = ("low", "zero", "mean_output", "drop_blocks")
    assert set(cells) == {f"{label}-{keep}-s0" for label in labels for keep in (0.5, 0.01)}
    for name in (f"{label}-0.5-s0" for label in labels):
        row = cells[name]
        assert row["null"] == (row["label"] != "low") and row["impossible"] is None
        assert 0 < row["achieved_keep"] <= 0.5 and row["missed_by"] == pytest.approx(row["achieved_keep"] - 0.5)
        with safe_open(finished / name / "recovered" / "model.safetensors", "pt") as tensors:
            stored = [tensors.get_tensor(key) for key in tensors.keys()]
        assert row["bits"] == sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)
    assert read_json(finished / "comparison.json")["finished"]


def test_the_dense_model_is_hashed_once_for_all_cells(tiny, finished, monkeypatch):
    hashed = []
    counted = SimpleNamespace(blake2b=lambda **options: hashed.append(options) or hashlib.blake2b(**options))
    monkeypatch.setattr(source, "hashlib", counted)
    run_comparison(comparison(tiny, budgets=[0.5, 0.01]), finished)
    assert len(hashed) == 1


def test_a_budget_that_a_method_cannot_meet_is_said_and_stops_nothing(finished):
    cells = {row["cell"]: row for row in read_json(finished / "comparison.json")["cells"]}
    assert "cannot be met; the smallest possible is 0." in cells["low-0.01-s0"]["impossible"]
    assert not (finished / "low-0.01-s0" / "compress.json").exists()
    assert cells["zero-0.01-s0"]["achieved_keep"] == 0 and cells["zero-0.01-s0"]["impossible"] is None


def test_all_cells_get_the_same_calibration_and_recovery(finished):
    recipes = [json.loads(path.read_text()) for path in finished.glob("*-0.5-s0/recipe.json")]
    assert len(recipes) == 4
    for key in ("calibration", "recover", "evaluate", "seed", "model"):
        assert all(recipe[key] == recipes[0][key] for recipe in recipes)


def test_rows_have_what_was_measured(finished):
    rows = {row["cell"]: row for row in comparison_rows(finished)}
    assert rows["dense"]["perplexity facts"] > 1 and "kl facts" not in rows["dense"]
    kinds = {row["kind"]: row["value"] for row in stage_rows(finished / "low-0.5-s0", "evaluate")}
    assert rows["low-0.5-s0"]["kl facts"] == kinds["kl"] > 0
    assert rows["low-0.5-s0"]["speed at 1 tokens"] > 0


def test_a_second_call_makes_only_what_is_missing(tiny, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*.json") if path.name != "recipe.json"}
    more = comparison(tiny, methods={"low": {"method": {"name": "svd"}}, "mixt": {"method": {"name": "mixt"}}})
    run_comparison(more, finished)
    after = {path: path.stat().st_mtime_ns for path in finished.glob("*/*.json") if path.name != "recipe.json"}
    assert before.items() <= after.items()
    assert {path.parent.name for path in after.keys() - before.keys()} == {"mixt-0.5-s0"}


def test_the_page_has_every_cell(finished, tmp_path):
    page = build_report([finished], tmp_path / "page.html").read_text()
    assert "Quality against stored bits" in page and "drop_blocks" in page


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": {"a b": {"method": {"name": "svd"}}}}, "a label is made of letters, digits"),
        ({"methods": {"dense": {"method": {"name": "svd"}}}}, "is not 'dense'"),
        ({"methods": {"low": {"method": {"name": "svd", "keep": 0.3}}}}, "keep=0.3 and a budget cannot both hold"),
        ({"budgets": [0.5, 0.5]}, "each must stand there once"),
        ({"budgets": [1.5]}, "less than or equal to 1"),
        ({"recipe": None}, "needs base"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tiny, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        comparison(tiny, **changes)


def test_a_recipe_with_a_plan_or_without_calibration_is_refused(tiny):
    recipe = comparison(tiny).recipe.model_dump(mode="json")
    with pytest.raises(ValueError, match="plan and budget are made by the comparison"):
        comparison(tiny, recipe=recipe | {"plan": [{"method": {"name": "zero"}}]})
    with pytest.raises(ValueError, match="needs calibration: the null baselines are chosen"):
        comparison(tiny, recipe=recipe | {"calibration": None})


def test_the_published_comparison_can_be_read_and_asks_for_every_rival():
    published = Comparison.load(Path(__file__).parents[2] / "recipes" / "stories260k_comparison.yaml")
    methods = {contender.method.name for contender in published.contenders.values()}
    assert methods >= {"mixt", "svd", "svd_llm", "coala", "laser", "dobi_svd", "hassle_free", "rtn"}
    assert methods >= {"zero", "mean_output", "drop_blocks"} and len(published.budgets) == 3
