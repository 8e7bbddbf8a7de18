"""A result that is larger than its source is said, and what a sliced model adds is counted in its budget."""

from __future__ import annotations

import pytest
import torch

from tensormix.allocation import ImpossibleBudget, allocate
from tensormix.allocation.growth import growth, growth_of
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import load_model
from tensormix.plan import Plan
from tensormix.profile import num_parameters
from tensormix.recipe import Recipe
from tensormix.run.check import check
from tensormix.settings import Budget


def slicing(**settings):
    return {"method": {"name": "slice_gpt", "multiple": 1, **settings}}


@pytest.mark.parametrize("keep", [0.6, 0.85, 1.0])
@pytest.mark.parametrize("over", ["sites", "model"])
def test_a_sliced_model_has_at_most_the_numbers_that_were_asked_for(tiny, tmp_path, keep, over):
    """Its head was tied: at full width it would have more numbers than the dense model."""
    budget = Budget(keep=keep, of="parameters", over=over)
    found = allocate(tiny, slicing(keep_channels=1.0), budget)
    batches = torch.randint(3, 60, (2, 32))
    compress_checkpoint(tiny, tmp_path / "out", found.plan, batches)
    dense, sliced = num_parameters(load_model(str(tiny))), num_parameters(load_model(str(tmp_path / "out")))
    assert sliced <= found.rows[0]["achieved"] <= found.rows[0]["asked"] <= keep * dense
    wider = found.plan.whole.sized(found.plan.whole.keep_channels + 1 / 32)
    compress_checkpoint(tiny, tmp_path / "wider", Plan.of(wider), batches)
    assert num_parameters(load_model(str(tmp_path / "wider"))) > keep * dense - 100  # the final norm is gone


def test_a_budget_below_the_narrowest_stream_names_the_smallest(tiny):
    with pytest.raises(ImpossibleBudget, match=r"cannot be met; the smallest possible is 0\.\d+"):
        allocate(tiny, slicing(keep_channels=1.0), Budget(keep=0.001, of="parameters"))
    with pytest.raises(ValueError, match=r"slice_gpt has one width .* only by 'uniform'.*got by 'greedy'"):
        allocate(tiny, slicing(keep_channels=1.0), Budget(keep=0.5, by="greedy"))


def test_check_foresees_that_a_model_grows_and_what_grew(tiny):
    calibration = {"text": {"exam": True}}
    of = {"model": str(tiny), "calibration": calibration, "plan": [slicing(keep_channels=1.0)]}
    result = check(Recipe.model_validate(of))
    sentence = result["larger"]
    for number in (result["dense"]["parameters"], result["compressed"]["parameters"]):
        assert f"{number:,}" in sentence
    assert "larger than its source" in sentence and "lm_head" in sentence and "it was tied to the embedding" in sentence
    budgeted = {**of, "plan": [{"method": {"name": "slice_gpt"}}], "budget": {"keep": 0.9, "of": "parameters"}}
    result = check(Recipe.model_validate(budgeted))
    assert "larger" not in result
    assert result["compressed"]["parameters"] <= 0.9 * result["dense"]["parameters"]


def test_of_rows_alone_growth_is_their_sum():
    rows = [
        {"site": site, "method": "x", "parameters": after, "dense_parameters": before}
        for site, after, before in (("a", 12, 10), ("b", 9, 10), ("head", 5, 0))
    ]
    sentence = growth_of(rows)
    assert sentence and "26 numbers from 20 (+30.0 %)" in sentence and "head +5 (it was tied" in sentence
    assert growth_of(rows[1:2]) is None and growth(10, 10, rows) is None
