"""Bits of 2, 3, 4 and 8 mixed under one budget, on a real model: better than the same bits everywhere, no larger."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensormix.allocation import allocate
from tensormix.compression import compress
from tensormix.data import packed_source
from tensormix.models import ModelSource, load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.settings import Source

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL, TEXT = SHARED / "models" / "stories260K", SHARED / "text" / "tinystories_1000.json"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="shared/data is not beside the checkout: no stories260K")


@pytest.fixture(scope="module")
def text():
    """Tokens that are judged, and batches of others that calibrate."""
    ids = packed_source(load_tokenizer(MODEL), Source(file=str(TEXT), num_documents=120))
    return ids[:16384].view(-1, 512), list(ids[20000 : 20000 + 8192].view(2, 16, 256))


@torch.no_grad()
def loss(model, judged):
    return sum(float(model(row[None], labels=row[None], use_cache=False).loss) for row in judged) / len(judged)


@pytest.mark.slow
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
