"""What competes in models of other families, and in a run; and that the dense model stays as it was meanwhile."""

import pytest
import torch

from plans import one_rule
from tensormix.allocation import allocate
from tensormix.allocation.choice import plan_of
from tensormix.allocation.competition import compete
from tensormix.allocation.regions import Regions
from tensormix.allocation.rises import Rises
from tensormix.compression import Home, compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import load_model
from tensormix.recipe import Recipe
from tensormix.report import build_report
from tensormix.run import run_recipe, stage_rows
from tensormix.run.check import check
from tensormix.settings import Budget
from tensormix.sites.calls import Activations
from tensormix.storage.files import read_json
from test_rows import check_stages
from zoo import make, token_ids

WINDOWS = [token_ids(rows=1, length=16, seed=seed) for seed in range(3)]
AMONG = [
    {"name": "svd_llm"},
    {"name": "flat_llm"},
    {"name": "tucker_heads", "keep": 0.5},
    {"name": "mean_output"},
    {"name": "gptq", "bits": 4, "group": 16},
    {"name": "drop_blocks"},
]


def auto(among=AMONG, **changes):
    return one_rule({"name": "auto", "among": among, "keeps": [0.5], "tokens": 16} | changes)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "phi3", "opt", "mixtral", "qwen2_moe"])
def test_candidates_come_and_go_and_leave_the_model_as_it_was(family):
    """Biases, fused layers, experts, and owners that several layers share."""
    model = make(family).eval()
    names, state = [name for name, _ in model.named_modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = model(WINDOWS[2]).logits
    regions = Regions(model, auto().choice, Home(), "bits", 0.5)
    for region in regions.regions:
        own = sum(32 * site.weight.numel() for site in region.sites) if not region.is_block else region.dense_cost
        assert region.dense_cost == own and all(c.cost < own for c in region.candidates)
    rises = Rises(model, WINDOWS[2:], "kl")
    losses = compete(model, regions.regions, WINDOWS[:2], rises, torch.float64, Activations(), lambda name: None)
    assert {c.label for c in losses} >= {"svd_llm", "mean_output", "gptq", "drop_blocks"}
    assert all(rise.mean > 0 for rise in losses.values())
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(WINDOWS[2]).logits, before)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("method", ["svd_llm", "flat_llm", "mean_output"])
def test_a_candidate_loses_what_the_compressed_model_does(family, method):
    """Biases included: those that move to an operator, and those that a method gives itself."""
    model, other = make(family).eval(), make(family).eval()
    regions = Regions(model, auto([{"name": method}]).choice, Home(), "parameters", 0.5)
    rises = Rises(model, WINDOWS[2:], "kl")
    losses = compete(model, regions.regions, WINDOWS[:2], rises, torch.float64, Activations(), lambda name: None)
    region = next(region for region in regions.regions if region.block == 1)
    candidate = next(candidate for candidate in region.candidates if candidate.size in (0.5, None))
    compress(other, plan_of({region: candidate}), WINDOWS[:2])
    assert losses[candidate].mean == pytest.approx(rises.of(other).mean, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe", "gemma3"])
def test_the_plan_is_one_that_compresses_so_far_in_memory_and_from_the_disk(family, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    found = allocate(tmp_path / "dense", auto(), Budget(keep=0.6, of="parameters"), WINDOWS)
    total = found.rows[0]
    assert 0.3 < total["achieved_keep"] <= 0.6
    model = load_model(tmp_path / "dense")
    compress(model, found.plan, WINDOWS)
    compress_checkpoint(tmp_path / "dense", tmp_path / "compressed", found.plan, WINDOWS)
    streamed = load_model(tmp_path / "compressed")
    with torch.no_grad():
        assert torch.equal(model(WINDOWS[0]).logits, streamed(WINDOWS[0]).logits)


def test_a_run_decides_once_and_goes_on_from_the_plan(tiny, tmp_path):
    data = {
        "model": str(tiny),
        "plan": [{"method": {"name": "auto", "among": [{"name": "svd_llm"}, {"name": "narrow"}], "tokens": 32}}],
        "budget": {"keep": 0.7, "of": "parameters"},
        "calibration": {"text": {"facts": True}, "num_windows": 4, "window": 32},
        "evaluate": {
            "exam": None,
            "perplexity": [{"text": {"facts": True}, "window": 64, "stride": 64, "num_tokens": 256}],
        },
        "diagnose": None,
        "profile": None,
    }
    recipe = Recipe.model_validate(data)
    foreseen = check(recipe)
    assert foreseen["assumed"] and 0.5 < foreseen["budget"][0]["achieved_keep"] <= 0.7
    run_recipe(recipe, tmp_path)
    page = build_report([tmp_path]).read_text()
    assert "Plans within the budget" in page and "What regions became" in page
    found = check_stages(tmp_path)
    assert found["allocate"] == {"budget", "size", "contender", "candidate"}
    decided = read_json(tmp_path / "allocate.json")
    sizes = {row["site"]: row for row in decided["rows"] if row["kind"] == "size"}
    for row in stage_rows(tmp_path, "compress"):
        assert (row["method"], row["parameters"]) == (sizes[row["site"]]["method"], sizes[row["site"]]["cost"])
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json") if file.name != "recipe.json"}
    run_recipe(recipe, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in made} == made
    by_hand = Recipe.model_validate(data | {"plan": decided["plan"], "budget": None})
    run_recipe(by_hand, tmp_path / "again", reference=tmp_path / "dense")
    assert stage_rows(tmp_path / "again", "evaluate") == stage_rows(tmp_path, "evaluate")
