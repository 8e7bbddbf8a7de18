"""The walk over the blocks must reproduce the model itself before it is trusted to compress it."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

from plans import plan_of
from tensormix.compression import compress
from tensormix.methods import DropBlocks, LinearMethod, MeanOutput, Mixt, Svd, ZeroMethod
from tensormix.operators import Bypass, LowRank
from tensormix.plan import Plan
from tensormix.sites import blocks, find_sites
from tensormix.sites.calls import record_calls
from tensormix.statistics import Gram
from zoo import NUM_BLOCKS, ZOO, make, token_ids


class Exact(LinearMethod):
    """Loses nothing, and keeps what it was shown."""

    name: Literal["exact"] = "exact"
    needs = (Gram,)
    seen: ClassVar[list] = []

    def empty(self, in_features, out_features):
        return LowRank(in_features, out_features, rank=min(in_features, out_features))

    def fit(self, weight, stats):  # (O, I)
        self.seen.append(stats[Gram].sum.clone())
        return LowRank.from_dense(weight, rank=min(weight.shape))


@pytest.fixture(autouse=True)
def nothing_seen_yet():
    Exact.seen.clear()


@pytest.fixture(params=ZOO)
def model(request):
    return make(request.param)


def gram_by_hooks(model, batches) -> dict[str, Gram]:
    """What a plain forward pass feeds each linear layer."""
    sites = [site for site in find_sites(model) if site.kind == "linear"]
    grams = {site.name: Gram(site.in_features) for site in sites}
    handles = [
        site.module.register_forward_pre_hook(lambda _m, args, name=site.name: grams[name].update(args[0]))
        for site in sites
    ]
    for ids in batches:
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


@torch.no_grad()
def test_the_walk_reproduces_the_model(model):
    """Bit for bit: the recorded calls are the model's own, with the masks and positions of each block."""
    batches = [token_ids(seed=1), token_ids(rows=1, length=7, seed=2)]
    for number, ids in enumerate(batches):
        seen = {}
        handle = blocks(model)[-1].register_forward_hook(lambda _m, _a, out, seen=seen: seen.update(out=out))
        model(ids, use_cache=False)
        handle.remove()
        expected = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]

        calls = record_calls(model, batches)
        assert len(calls) == NUM_BLOCKS and all(len(of_block) == len(batches) for of_block in calls)
        hidden = calls[0][number].hidden
        for block, of_block in zip(blocks(model), calls, strict=True):
            hidden = of_block[number].run(block, hidden)
        assert torch.equal(hidden, expected)


@torch.no_grad()
def test_what_is_recorded_for_many_batches_is_there_once():
    """Positions and masks of equal windows are one tensor, of other windows their own; logits are never computed."""
    model, asked = make("gemma2"), []
    model.lm_head.register_forward_pre_hook(lambda *_: asked.append("logits"))
    batches = [token_ids(seed=1), token_ids(seed=2), token_ids(seed=3, length=5), token_ids(seed=4, length=5)]
    for of_block in record_calls(model, batches, lambda hidden: hidden.double()):
        tensors = [[*call.kwargs["position_embeddings"], call.kwargs["attention_mask"]] for call in of_block]
        for first, second, other, last in zip(*tensors, strict=True):
            assert first is second and other is last and first.shape != other.shape
        assert all(call.hidden.dtype == torch.float64 for call in of_block)
    assert asked == []


@torch.no_grad()
def test_the_walk_reproduces_a_model_that_is_compressed_already():
    model = make("gptj")
    compress(model, plan_of({"method": DropBlocks(), "blocks": "1"}, {"method": Svd(keep=0.5), "blocks": "0"}))
    ids, seen = token_ids(), {}
    blocks(model)[-1].register_forward_hook(lambda _m, _a, out: seen.update(out=out[0]))
    model(ids, use_cache=False)
    expected = seen["out"]
    calls = record_calls(model, [ids])
    hidden = calls[0][0].hidden
    for block, (call,) in zip(blocks(model), calls, strict=True):
        hidden = call.run(block, hidden)
    assert torch.equal(hidden, expected)


@torch.no_grad()
def test_statistics_are_what_the_model_feeds_its_layers(model):
    """With an exact method nothing drifts, so the sums must equal those of a plain forward pass."""
    batches = [token_ids(seed=1), token_ids(length=5, seed=2)]
    expected = gram_by_hooks(model, batches)
    rows = compress(model, plan_of({"method": Exact()}), batches)
    assert len(Exact.seen) == len(rows) == len(expected)
    for row, got in zip(rows, Exact.seen, strict=True):
        want = expected[row["site"]].sum
        error = float((got - want).norm() / want.norm())
        assert error < 1e-4, f"{row['site']}: relative error of the Gram matrix {error:.1e}"


@torch.no_grad()
def test_later_blocks_see_what_the_compressed_ones_pass_on(model):
    """After a coarse fit of block 0, the statistics of block 2 are those of the compressed model, not of the dense."""
    ids = token_ids()
    dense = gram_by_hooks(model, [ids])
    rules = plan_of({"method": Svd(keep=0.2), "blocks": "0"}, {"method": Exact(), "blocks": "2"})
    rows = compress(model, rules, [ids])
    name = next(row["site"] for row in rows if row["block"] == 2)
    module = model.get_submodule(name)
    expected = Gram(module.in_features)
    module.register_forward_pre_hook(lambda _m, args: expected.update(args[0]))
    model(ids, use_cache=False)
    got = Exact.seen[0]
    assert float((got - expected.sum).norm() / expected.sum.norm()) < 1e-5
    assert float((got - dense[name].sum).norm() / dense[name].sum.norm()) > 1e-2


@torch.no_grad()
def test_an_exact_method_changes_nothing(model):
    ids = token_ids()
    before = model(ids).logits
    rows = compress(model, plan_of({"method": Exact()}), [ids])
    assert max(row["relative_error"] for row in rows) < 1e-5
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_empty_plan_changes_nothing():
    model, ids = make("llama"), token_ids()
    before = model(ids).logits
    assert compress(model, Plan()) == []
    assert torch.equal(model(ids).logits, before)
    assert getattr(model.config, "quantization_config", None) is None


@torch.no_grad()
def test_dropped_blocks_are_what_skipping_them_gives(model):
    """A dropped block is the identity: the model equals one whose block outputs are replaced by their inputs."""
    ids = token_ids()

    def skip(_module, args, out):
        return (args[0], *out[1:]) if isinstance(out, tuple) else args[0]

    handles = [blocks(model)[index].register_forward_hook(skip) for index in (0, 2)]
    expected = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    rows = compress(model, plan_of({"method": DropBlocks(), "blocks": [0, 2]}))
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert isinstance(blocks(model)[0], Bypass)
    assert [(row["operator"], row["relative_error"], row["parameters"]) for row in rows] == [("Bypass", None, 0)] * 2
    assert all(row["dense_parameters"] > 0 and row["dense_macs_per_token"] > 0 for row in rows)


@torch.no_grad()
def test_the_mean_output_is_the_mean_of_the_outputs():
    """In the first block the inputs are dense, so the constant is the mean of what the layer gave."""
    model, ids = make("opt"), token_ids()
    seen = []
    handle = blocks(model)[0].fc1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model(ids)
    handle.remove()
    compress(model, plan_of({"method": MeanOutput(), "blocks": "0", "sites": ("up",)}), [ids])
    torch.testing.assert_close(blocks(model)[0].fc1(torch.randn(1, 32))[0], seen[0].reshape(-1, 48).mean(0))


def test_methods_without_statistics_need_no_forward_pass():
    model = make("llama")
    model.forward = None  # any call would fail
    rows = compress(model, plan_of({"method": Mixt(num_branches=2)}))
    assert len(rows) == 7 * NUM_BLOCKS


def test_the_blocks_before_the_last_statistic_only_are_run():
    model, calls = make("llama"), []
    for block in blocks(model):
        block.register_forward_hook(lambda module, *_: calls.append(module.self_attn.layer_idx))
    rules = plan_of({"method": MeanOutput(), "blocks": "1"}, {"method": ZeroMethod(), "blocks": "2-3"})
    compress(model, rules, [token_ids()])
    assert calls == [0, 1]


def test_bf16_models_stay_bf16():
    model = make("qwen2").to(torch.bfloat16)
    rows = compress(model, plan_of({"method": Exact(), "blocks": "0"}, {"method": MeanOutput()}), [token_ids()])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert max(row["relative_error"] for row in rows if row["block"] == 0) < 0.02


@torch.no_grad()
def test_a_model_that_is_not_from_transformers():
    """Only blocks in a ModuleList are asked for."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, hidden):
            return hidden + self.down_proj(self.up_proj(hidden).relu())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, ids, use_cache=False):
            hidden = self.embed(ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    torch.manual_seed(0)
    model, ids = Model(), torch.randint(11, (2, 5))
    before = model(ids)
    rows = compress(model, plan_of({"method": Exact(), "sites": ("up", "down")}), [ids])
    assert len(rows) == 6
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
