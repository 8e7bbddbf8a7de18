"""Bits of 2, 3, 4 and 8 mixed under one budget, on a real model: better than the same bits everywhere, no larger."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from budget_plans import BATCHES, save_varied_llama
from tensormix.allocation import ImpossibleBudget, allocate
from tensormix.compression import compress
from tensormix.data import packed_source
from tensormix.models import ModelSource, load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.settings import Budget, Source

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL, TEXT = SHARED / "models" / "stories260K", SHARED / "text" / "tinystories_1000.json"


@pytest.fixture(scope="module")
def text():
    """Tokens that are judged, and batches of others that calibrate."""
    ids = packed_source(load_tokenizer(MODEL), Source(file=str(TEXT), num_documents=120))
    return ids[:16384].view(-1, 512), list(ids[20000 : 20000 + 8192].view(2, 16, 256))


@torch.no_grad()
def loss(model, judged):
    return sum(float(model(row[None], labels=row[None], use_cache=False).loss) for row in judged) / len(judged)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="shared/data is not beside the checkout: no stories260K")
@pytest.mark.parametrize("method", [{"name": "rtn", "symmetric": False}, {"name": "gptq"}, {"name": "hqq"}], ids=str)
def test_mixed_bits_beat_uniform_ones_of_the_same_size(method, text):
    judged, batches = text
    method = {**method, "group": 32}
    model = load_model(MODEL, dtype="float32")
    rows = compress(model, Plan.model_validate([{"method": {**method, "bits": 3}}]), batches)
    uniform = loss(model, judged)
    bits, dense = (sum(row[key] for row in rows) for key in ("bits", "dense_parameters"))
    recipe = Recipe.model_validate(
        {
            "model": str(MODEL),
            "plan": [{"method": method}],  # without bits
            "budget": {"keep": bits / dense / 32, "by": "sensitivity", "measure": "kl"},
            "calibration": {"text": {"file": str(TEXT)}, "num_windows": 8, "window": 256},
        }
    )
    assert recipe.budget is not None
    found = allocate(ModelSource(MODEL), recipe.plan, recipe.budget, batches, dtype="float32")
    model = load_model(MODEL, dtype="float32")
    after = sum(row["bits"] for row in compress(model, found.plan, batches))
    sizes = {row["size"] for row in found.rows[1:]}
    assert after == found.rows[0]["achieved"] <= bits and len(sizes) >= 3 and sizes <= {2, 3, 4, 8, None}
    assert loss(model, judged) < uniform


@pytest.mark.parametrize(
    "method",
    [{"name": "gptq"}, {"name": "rounded_low_rank", "bits": 2, "rounds": 1}, {"name": "rounded_sparse", "bits": 2}],
    ids=lambda method: method["name"],
)
def test_a_budget_below_the_fewest_bits_says_the_smallest_and_above_it_decides(method, tmp_path):
    folder, plan = save_varied_llama(tmp_path), [{"method": {**method, "group": 16}}]

    def recipe(keep):
        budget, text = {"keep": keep, "by": "greedy"}, {"text": {"facts": True}}
        return Recipe.model_validate({"model": str(folder), "plan": plan, "budget": budget, "calibration": text})

    with pytest.raises(ImpossibleBudget, match=r"cannot be met; the smallest possible is 0\.\d+"):
        allocate(folder, recipe(0.05).plan, Budget(keep=0.05, by="greedy", levels=3), BATCHES)
    found = allocate(folder, recipe(0.2).plan, Budget(keep=0.2, by="greedy", levels=3), BATCHES)
    assert found.rows[0]["achieved"] <= found.rows[0]["asked"] and len({row["size"] for row in found.rows[1:]}) > 1
