"""q, k and v, or gate and up, in one call: the same outputs and checkpoint, in every family."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

import tensormix.inference.siblings as module_under_test
from fused_models import ATTENTION, MLP, Products, compressed, logits
from tensormix.inference.siblings import fuse_siblings
from tensormix.operators import MixT, Siblings, View
from tensormix.plan import Plan
from tensormix.sites import cost_of, macs_per_token
from zoo import ZOO

GROUPS = {"phi3": [], "gpt2": [], "gpt_neox": [], "opt": [ATTENTION], "gptj": [ATTENTION]}  # packed; not gated


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def llama():
    return compressed("llama")


@pytest.mark.parametrize("family", ZOO)
def test_a_model_gives_the_same_in_fewer_calls_and_gets_its_layers_back(family):
    model = compressed(family)
    before, modules, macs = logits(model), list(model.modules()), macs_per_token(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    numbers = sum(tensor.numel() for tensor in state.values())
    with Products() as apart:
        logits(model)
    with fuse_siblings(model) as rows, Products() as together:
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == numbers
        assert macs_per_token(model) == macs
    groups = GROUPS.get(family, [ATTENTION, MLP])
    assert [row["siblings"] for row in rows] == groups * 2
    assert all(row["chosen"] == "together" and not row["why"] for row in rows)
    others = apart.calls["mixt"] - 2 * sum(map(len, groups))
    assert together.calls == Counter({"mixt": others, **({"mixt_siblings": 2 * len(groups)} if groups else {})})
    assert list(model.modules()) == modules and not any("forward" in vars(module) for module in modules)
    assert same_state(model.state_dict(), state)
    assert torch.equal(logits(model), before)


def test_what_is_saved_inside_is_one_product_when_it_is_loaded(tmp_path, llama):
    """To the bit, from one file and from several; what is saved afterwards is the ordinary checkpoint again."""
    llama.save_pretrained(tmp_path / "before")
    with fuse_siblings(llama):
        wanted = logits(llama)
        llama.save_pretrained(tmp_path / "together", max_shard_size="20KB")
        costs = cost_of(llama)
    llama.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "together", output_loading_info=True)
    assert not any(report.values())
    with Products() as products:
        assert torch.equal(logits(again), wanted)
    assert products.calls["mixt_siblings"] == 4 and cost_of(again) == costs
    assert cost_of(llama)[:3] == costs[:3]
    again.save_pretrained(tmp_path / "again")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map={"": "cpu"})
    assert torch.equal(logits(twice), wanted)
    assert len(list((tmp_path / "together").glob("*.safetensors"))) > 1


@torch.no_grad()
def test_one_product_whose_biases_rest_on_disk(tmp_path):
    """accelerate brings what a layer holds when the layer is called."""
    model = compressed("qwen2")
    with fuse_siblings(model):
        wanted = logits(model)
        model.save_pretrained(tmp_path / "together")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{index}": "disk" for index in range(4)}
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "together", device_map=places, offload_folder=str(tmp_path / "away")
    ).eval()
    torch.testing.assert_close(logits(away), wanted, rtol=1e-5, atol=1e-5)


def test_a_model_loaded_as_one_product_has_a_dense_form(tmp_path, llama):
    with fuse_siblings(llama):
        llama.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path).dequantize()
    assert not any(isinstance(module, View | Siblings) or "forward" in vars(module) for module in dense.modules())
    torch.testing.assert_close(logits(dense), logits(llama), rtol=1e-5, atol=1e-5)


def test_what_is_loaded_inside_stays(llama):
    other = compressed("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = copy.deepcopy(llama)
    with fuse_siblings(model), fuse_siblings(other):
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), logits(other))


def test_nothing_is_stored_twice(llama):
    count = sum(parameter.numel() for parameter in llama.parameters())
    operators = [module for module in llama.modules() if isinstance(module, MixT)]
    with fuse_siblings(llama):
        assert sum(parameter.numel() for parameter in llama.parameters()) == count
        assert sum(core.untyped_storage().nbytes() for op in operators[:3] for core in op.cores) == 0
    assert all(core.untyped_storage().nbytes() == core.nbytes for op in operators for core in op.cores)


def plan_of(*rules):
    return Plan.model_validate([{"blocks": "last 1", "sites": sites, "method": method} for sites, method in rules])


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (
            plan_of((["k", "v"], {"name": "mixt", "num_branches": 3}), (["q"], {"name": "svd", "keep": 0.5})),
            {
                ("k_proj", "v_proj"): "",
                ("q_proj",): "it is a LowRank, and only MixT layers become one product",
            },
        ),
        (
            plan_of((["q", "v"], {"name": "mixt", "num_branches": 3}), (["k"], {"name": "mixt", "num_branches": 2})),
            {
                ("q_proj", "v_proj"): "",
                ("k_proj",): "beside q_proj, num_branches is 3 and 2; beside v_proj, num_branches is 3 and 2",
            },
        ),
        (
            plan_of((["gate"], {"name": "mixt", "num_branches": 3})),
            {
                ("gate_proj",): "no other layer is left to be one product with",
                ("up_proj",): "it is a Linear, and only MixT layers become one product",
            },
        ),
    ],
)
def test_what_differs_stays_separate_and_is_told(plan, expected):
    model = compressed("llama", plan)
    before = logits(model)
    with fuse_siblings(model) as rows:
        assert {tuple(row["siblings"]): row["why"] for row in rows} == expected
        assert all((row["chosen"] == "together") == (not row["why"]) for row in rows)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("separate", "chosen"), [(1.0, "separate"), (3.0, "together")])
def test_with_a_number_of_tokens_the_faster_form_is_chosen(llama, monkeypatch, separate, chosen):
    asked = []

    def clock(one, other, x, repeats):
        torch.testing.assert_close(one(x), other(x))
        asked.append((x.shape, repeats))
        return separate, 2.0

    monkeypatch.setattr(module_under_test, "milliseconds", clock)
    with fuse_siblings(llama, num_tokens=5, repeats=4) as rows:
        assert {(row["chosen"], row["separate_ms"], row["together_ms"]) for row in rows} == {(chosen, separate, 2.0)}
        assert any(isinstance(module, View) for module in llama.modules()) == (chosen == "together")
    assert {row["why"] for row in rows} == ({""} if separate > 2 else {"together they are not faster at 5 tokens"})
    assert asked == [((5, 32), 4)] * 2  # one for each kind of group: the two blocks are alike


@pytest.mark.parametrize("sizes", [{"num_tokens": 0}, {"repeats": 0}])
def test_sizes_below_one_are_refused(llama, sizes):
    with pytest.raises(ValueError, match=r"^fuse_siblings: \w+ must be at least 1, got 0$"):
        fuse_siblings(llama, **sizes).__enter__()


def test_an_error_inside_leaves_the_model_as_it_was(llama):
    before, modules = logits(llama), list(llama.modules())
    with pytest.raises(RuntimeError, match="mine"), fuse_siblings(llama):
        raise RuntimeError("mine")
    assert list(llama.modules()) == modules and torch.equal(logits(llama), before)
