"""Dense where dense is faster: what is chosen, what comes back, what it costs. And models that are compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensormix.compression import compress
from tensormix.inference.faster import dense_where_faster
from tensormix.models import load_model
from tensormix.operators import LowRank, MixT, Sparse
from tensormix.plan import Plan


@pytest.fixture(scope="module")
def layers():
    """One layer that unpacks half a million positions at every call, one with 1/16 of 4 million numbers, one plain."""
    torch.manual_seed(0)
    slow = Sparse.from_dense(torch.randn(1024, 1024), num_values=2**19)
    slow.bias = nn.Parameter(torch.randn(1024))
    fast = LowRank(1024, 4096, rank=16)
    for parameter in fast.parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(slow, fast, nn.ReLU())


def test_each_layer_gets_its_faster_form_and_gets_its_own_back(layers):
    x = torch.randn(1, 1024)
    before, y = list(layers), layers(x)
    with dense_where_faster(layers, num_tokens=1) as rows:
        assert [(row["module"], row["chosen"]) for row in rows] == [("0", "dense"), ("1", "structured")]
        assert rows[0]["dense_ms"] < rows[0]["structured_ms"] and rows[1]["structured_ms"] < rows[1]["dense_ms"]
        assert [row["extra_bytes"] for row in rows] == [4 * 1024 * 1024, 0]
        assert type(layers[0]).__name__ == "Dense" and layers[0].bias is before[0].bias and layers[1] is before[1]
        torch.testing.assert_close(layers(x), y, rtol=1e-4, atol=1e-3)
    assert list(layers) == before


def test_a_small_mixture_in_bfloat16_is_dense_in_bfloat16():
    small = MixT.from_dense(torch.randn(64, 64), num_branches=3).bfloat16()
    holder = nn.Sequential(small)
    with dense_where_faster(holder, num_tokens=4) as rows:
        assert rows[0]["chosen"] == "dense" and rows[0]["dense_ms"] < rows[0]["structured_ms"]
        assert {parameter.dtype for parameter in holder.parameters()} == {torch.bfloat16}
    assert holder[0] is small


def test_an_error_inside_leaves_the_model_as_it_was(layers):
    before = list(layers)
    with pytest.raises(RuntimeError, match="mine"), dense_where_faster(layers, num_tokens=1, repeats=1):
        raise RuntimeError("mine")
    assert list(layers) == before


@pytest.mark.parametrize("sizes", [{"num_tokens": 0}, {"num_tokens": 1, "repeats": 0}])
def test_sizes_below_one_are_refused(layers, sizes):
    with pytest.raises(ValueError, match=r"^dense_where_faster: \w+ must be at least 1, got 0$"):
        dense_where_faster(layers, **sizes).__enter__()


@pytest.fixture(scope="module")
def model(tiny):
    model = load_model(str(tiny), dtype="float32")
    compress(model, Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}]))
    assert any(isinstance(module, MixT) for module in model.modules())
    return model


def test_a_compressed_model_compiles_in_one_graph(model):
    ids = torch.arange(2 * 14).view(2, 14) % 50
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
        )


def test_a_compressed_model_generates_with_a_static_cache(model):
    ids = torch.arange(2 * 14).view(2, 14) % 50
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    dynamic = model.generate(ids, **options)
    assert dynamic.shape == (2, 20)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), dynamic)
