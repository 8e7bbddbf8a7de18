"""A budget in a recipe: decided in the run, shown by check, learned within it."""

import json

import pytest

from budget_plans import BATCHES, save_varied_llama
from plans import one_rule
from tensormix.allocation import allocate
from tensormix.compression import compress
from tensormix.methods import DobiSvd
from tensormix.models import load_model, skeleton
from tensormix.recipe import Recipe
from tensormix.run import allocation_key, run_recipe, stage_rows
from tensormix.run.check import check
from tensormix.settings import Budget
from tensormix.storage.files import read_json


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_varied_llama(tmp_path_factory.mktemp("llama"))


def recipe(tiny, **changes):
    data = {
        "model": str(tiny),
        "plan": [{"method": {"name": "svd_llm"}}],
        "budget": {"keep": 0.5, "by": "spectrum"},
        "calibration": {"text": {"facts": True}, "num_windows": 4, "window": 32},
        "evaluate": {
            "exam": None,
            "kl": True,
            "perplexity": [{"text": {"facts": True}, "window": 64, "stride": 64, "num_tokens": 256}],
        },
        "profile": None,
    }
    return Recipe.model_validate(data | changes)


def test_a_run_leaves_the_plan_as_data_and_goes_on_from_it(tiny, tmp_path):
    asked = recipe(tiny)
    run_recipe(asked, tmp_path)
    decided = read_json(tmp_path / "allocate.json")
    assert decided["rows"][0]["achieved"] <= decided["rows"][0]["asked"]
    bits = {row["site"]: row["bits"] for row in stage_rows(tmp_path, "compress")}
    assert bits == {row["site"]: row["cost"] for row in decided["rows"][1:] if row["method"] != "dense"}
    kinds = {row["kind"]: row["value"] for row in stage_rows(tmp_path, "evaluate")}
    assert kinds["kl"] > 0 and {row["kind"] for row in stage_rows(tmp_path / "dense", "evaluate")} == {"perplexity"}
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json") if file.name != "recipe.json"}
    assert Recipe.model_validate(read_json(tmp_path / "recipe.json")) == asked
    run_recipe(asked, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in made} == made
    by_hand = recipe(tiny, plan=decided["plan"], budget=None)
    run_recipe(by_hand, tmp_path / "again", reference=tmp_path / "dense")
    assert stage_rows(tmp_path / "again", "evaluate") == stage_rows(tmp_path, "evaluate")
    assert allocation_key(asked) == decided["key"] != allocation_key(recipe(tiny, budget={"keep": 0.6}))


def test_each_block_can_be_compressed_alone_as_a_budget_decided(tiny, tmp_path):
    asked = recipe(tiny, diagnose={"run": ["compress_sensitivity"], "text": {"facts": True}, "num_windows": 2})
    run_recipe(asked, tmp_path)
    rows = [row for row in stage_rows(tmp_path, "diagnose") if row["kind"] == "sensitivity"]
    assert [row["block"] for row in rows] == [0, 1, 2, 3]
    assert len({row["value"] for row in rows}) == 4


def test_a_size_is_left_out_where_a_budget_decides_it(tiny):
    methods = [{"name": "laser"}, {"name": "rtn", "bits": 4, "of": {"name": "mixt"}}]
    methods += [{"name": "hassle_free", "rank": 1}, {"name": "drop_blocks"}]
    for method in methods:
        assert recipe(tiny, plan=[{"method": method}]).plan.root[0].method.name == method["name"]
    for wrong, sentence in (
        ({"plan": [{"method": {"name": "svd", "keep": 0.5}}]}, r"plan\[0\]: keep=0\.5 and a budget cannot both hold"),
        ({"plan": []}, "a budget needs a plan"),
        (
            {"plan": [{"method": {"name": "drop_blocks", "choose": "influence", "count": 1}}]},
            r"plan\[0\]: the budget cho",
        ),
        ({"plan": [{"method": {"name": "svd"}}], "budget": None}, r"keep\n\s+Field required"),
        ({"budget": {"keep": 0.5, "by": "sensitivity"}, "calibration": None}, "'sensitivity' is measured on"),
        ({"budget": {"keep": 1.5}}, "less than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            recipe(tiny, **({"plan": [{"method": {"name": "svd"}}]} | wrong))


def test_check_shows_the_sizes_without_reading_a_weight(tiny, tmp_path):
    config = tmp_path / "config.json"
    config.write_text((tiny / "config.json").read_text())
    asked = recipe(tmp_path, plan=[{"method": {"name": "mixt"}}], budget={"keep": 0.4}, calibration=None)
    result = check(asked)
    sizes = {row["site"]: row["cost"] for row in result["budget"][1:]}
    assert not result["assumed"] and len(sizes) == len(result["sites"]) == 28
    for row in result["sites"]:
        assert 32 * row["parameters"] == sizes[row["site"]]
    gone = result["dense"]["bytes"]["float32"] - result["compressed"]["bytes"]["float32"]
    assert 8 * gone == result["budget"][0]["dense"] - result["budget"][0]["achieved"]
    assert check(recipe(tiny))["assumed"]  # by spectrum: decided in the run
    assert json.loads(json.dumps(result)) == result
    assert skeleton(tmp_path) is not None


@pytest.mark.parametrize("storage", ["plain", "remapped"])
def test_learned_ranks_become_a_plan_within_the_budget(llama, storage):
    """What training finds is what the plan holds; it runs like any other."""
    found = allocate(
        llama, one_rule(DobiSvd(rank=1, storage=storage)), Budget(keep=0.25, by="learned", steps=4), BATCHES,
        dtype="bfloat16",
    )  # fmt: skip
    head, sites = found.rows[0], found.rows[1:]
    assert head["by"] == "learned" and 0.24 < head["achieved_keep"] <= 0.25  # of float32
    assert len(sites) == len(found.plan.root) == 28 and {row["method"] for row in sites} == {"dobi_svd"}
    model = load_model(llama, dtype="bfloat16")
    rows = compress(model, found.plan, BATCHES)
    assert sum(row["bits"] for row in rows) == head["achieved"]
