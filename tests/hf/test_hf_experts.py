"""Opened experts are saved and loaded like every operator, and transformers' own conversions leave them alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import tensormix.hf
from tensormix.models import skeleton
from tensormix.operators import (
    DenseStack,
    Experts,
    ExpertStack,
    LowRank,
    LowRankStack,
    MixT,
    StackedLinear,
    Sum,
    Zero,
    stack_of,
)  # fmt: skip
from tensormix.profile import bytes_on_disk, macs_per_token, num_parameters
from tensormix.sites import find_sites, install
from tensormix.sites.fused_experts import is_fused, open_experts
from zoo import MOE, NUM_BLOCKS, logits, make, token_ids


def experts_of(index):
    return f"model.layers.{index}.mlp.experts"


def put(model, name, make_one):
    """One operator for each expert at `name`, made from its weight."""
    site = next(site for site in find_sites(model) if site.name == name)
    made = [make_one(site.expert_weight(expert)) for expert in range(site.num_experts)]
    install(model, name, ExpertStack.from_experts(made))


def constant(weight):  # (O, I)
    zero = Zero.from_dense(weight)
    zero.bias = nn.Parameter(torch.randn(len(weight)))
    return zero


def low_rank(weight):  # (O, I)
    return LowRank.from_dense(weight, rank=3)


def compressed(family, constants=False):
    """Block 1 wholly, block 2 in part, block 3 opened only; block 0 stays as it is."""
    model = make(family)
    put(model, f"{experts_of(1)}.gate_up", lambda w: MixT.from_dense(w, num_branches=2))
    put(model, f"{experts_of(1)}.down", constant if constants else low_rank)
    put(model, f"{experts_of(2)}.gate_up", lambda w: Sum.from_dense(w, terms=[(LowRank, {"rank": 2}), (Zero, {})]))
    install(model, "model.layers.2.self_attn.o_proj", low_rank(model.model.layers[2].self_attn.o_proj.weight))
    open_experts(model, experts_of(3))
    tensormix.hf.attach(model)
    return model


def load(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # files are mapped to odd addresses, where products round otherwise
    return model


def assert_same(actual, expected):
    """Raise unless all tensors and all logits are equal to the bit."""
    states = actual.state_dict(), expected.state_dict()
    assert {name: t.shape for name, t in states[0].items()} == {name: t.shape for name, t in states[1].items()}
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert torch.equal(logits(actual), logits(expected))


def names_on_disk(folder):
    names = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


# Written by expert under the names of the blocks, by expert under other names, as it is in memory, and mixed with
# dense blocks.
@pytest.fixture(params=["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def family(request):
    return request.param


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"save_original_format": False}], ids=str)
@pytest.mark.parametrize("family", MOE)
def test_reload_is_bit_equal(family, options, tmp_path):
    model = compressed(family, constants=True)
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    again = load(tmp_path)
    assert_same(again, model)
    assert not again.is_quantized and not again.training
    kinds = {type(m) for m in again.modules() if isinstance(m, Experts | StackedLinear)}
    assert kinds == {Experts, ExpertStack, DenseStack}


def test_twice_around_is_bit_equal(family, tmp_path):
    model = compressed(family)
    model.save_pretrained(tmp_path / "once")
    load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert_same(load(tmp_path / "twice"), model)
    assert names_on_disk(tmp_path / "twice") == names_on_disk(tmp_path / "once")
    once, twice = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice"))
    assert once["quantization_config"] == twice["quantization_config"]


def test_low_rank_experts_come_back_as_they_were_written(family, tmp_path):
    """In one tensor for each factor, as they are compressed today, and one by one, as earlier folders have them."""
    for folder, stacked, kind in (("today", stack_of, LowRankStack), ("before", ExpertStack.from_experts, ExpertStack)):
        model, name = make(family), f"{experts_of(1)}.gate_up"
        site = next(site for site in find_sites(model) if site.name == name)
        install(model, name, stacked([low_rank(site.expert_weight(e)) for e in range(site.num_experts)]))
        tensormix.hf.attach(model)
        model.save_pretrained(tmp_path / folder)
        again = load(tmp_path / folder)
        assert type(again.get_submodule(name)) is kind
        assert_same(again, model)
    today, before = (load(tmp_path / folder) for folder in ("today", "before"))
    torch.testing.assert_close(logits(today), logits(before), rtol=1e-4, atol=1e-5)


def test_the_config_lists_both_stacks_of_opened_experts(tmp_path):
    entries = compressed("gpt_oss").config.quantization_config.to_dict()["operators"]
    json.dumps(entries)
    assert [name for name in entries if "experts" in name] == [
        f"{experts_of(index)}.{stack}" for index in (1, 2, 3) for stack in ("gate_up", "down")
    ]
    assert entries[f"{experts_of(1)}.down"] == {
        "operator": "ExpertStack",
        "each": {"operator": "LowRank", "in_features": 48, "out_features": 32, "rank": 3},
        "num_experts": 4,
        "bias": True,
    }
    assert entries[f"{experts_of(3)}.down"] == {
        "operator": "DenseStack", "num_experts": 4, "in_features": 48, "out_features": 32, "transposed": True,
        "bias": True,
    }  # fmt: skip


def test_transformers_neither_splits_nor_renames_what_is_ours(family, tmp_path):
    """Except for the prefix of Mixtral's blocks. Fused experts are written one by one, as ever."""
    model = compressed(family)
    model.save_pretrained(tmp_path)
    on_disk = {name.replace("block_sparse_moe", "mlp") for name in names_on_disk(tmp_path)}
    ours = {name for name in model.state_dict() if any(f"experts.{stack}." in name for stack in ("gate_up", "down"))}
    assert ours and ours <= on_disk
    expected = make(family)
    expected.save_pretrained(tmp_path / "dense")
    first = 1 if family == "deepseek_v3" else 0
    dense = {name for name in names_on_disk(tmp_path / "dense") if f"layers.{first}." in name}
    if first == 0:
        assert dense <= names_on_disk(tmp_path)


def test_a_model_with_nothing_but_opened_experts(family, tmp_path):
    model = make(family)
    expected = logits(model)
    for index in range(1, NUM_BLOCKS):
        open_experts(model, experts_of(index))
    tensormix.hf.attach(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(again, model)
    again.dequantize()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    before = make(family).state_dict()
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bf16(family, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype=torch.bfloat16)
    put(model, f"{experts_of(1)}.down", low_rank)
    tensormix.hf.attach(model)
    model.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small", dtype="auto")
    assert {p.dtype for p in again.model.layers[1].mlp.experts.parameters()} == {torch.bfloat16}
    assert_same(again, model)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_generation_with_and_without_cache_agrees(family, tmp_path):
    model = compressed(family)
    model.save_pretrained(tmp_path)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    cached, plain = (load(tmp_path).generate(token_ids(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reloaded", [False, True])
def test_dequantize_gives_fused_experts(family, reloaded, tmp_path):
    model = compressed(family)
    model.save_pretrained(tmp_path / "small")
    model = load(tmp_path / "small") if reloaded else model
    expected = logits(model)
    dense = [model.get_submodule(experts_of(2)).stacks["gate_up"].expert_dense(e).detach() for e in range(4)]
    model.dequantize()
    assert not any(isinstance(module, StackedLinear | Experts) for module in model.modules())
    assert getattr(model.config, "quantization_config", None) is None
    fused = model.get_submodule(experts_of(2))
    assert is_fused(fused) and fused.config is model.config
    stored = fused.gate_up_proj.mT if fused.is_transposed else fused.gate_up_proj
    assert torch.equal(stored, torch.stack(dense)) and fused.gate_up_proj.is_contiguous()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    assert_same(load(tmp_path / "dense"), model)
    make(family).save_pretrained(tmp_path / "original")
    assert names_on_disk(tmp_path / "dense") == names_on_disk(tmp_path / "original")


def test_dequantize_into_another_dtype():
    model = compressed("gpt_oss")
    model.dequantize(dtype=torch.bfloat16)
    for index in range(1, NUM_BLOCKS):
        assert {p.dtype for p in model.get_submodule(experts_of(index)).parameters()} == {torch.bfloat16}


def test_constants_of_experts_without_a_place_have_no_dense_form():
    with pytest.raises(
        ValueError, match=r"1.mlp.experts.down holds constant outputs, but the architecture has no bias"
    ):
        compressed("mixtral", constants=True).dequantize()
    model = compressed("gpt_oss", constants=True)
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_can_be_saved(tmp_path):
    model = compressed("deepseek_v3")
    copy.deepcopy(model).save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_skeleton_has_the_costs_of_the_model(family, tmp_path):
    model = compressed(family)
    model.save_pretrained(tmp_path)
    empty = skeleton(tmp_path)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert (num_parameters(empty), macs_per_token(empty)) == (num_parameters(model), macs_per_token(model))
    assert bytes_on_disk(model, tmp_path) >= 4 * num_parameters(model)


@pytest.mark.parametrize("name", [f"{experts_of(1)}.up", "model.layers.9.mlp.experts.down", "model.layers.1.mlp.down"])
def test_a_config_that_names_no_stack_is_refused(name):
    entry = {"operator": "DenseStack", "num_experts": 4, "in_features": 24, "out_features": 32, "bias": False}
    with pytest.raises(ValueError, match=rf"operators names '{name}', which a Qwen3MoeForCausalLM does not have"):
        tensormix.hf.install_empty(make("qwen3_moe"), {name: entry})


def test_a_config_with_another_number_of_experts_is_refused():
    entry = {"operator": "DenseStack", "num_experts": 5, "in_features": 24, "out_features": 32, "bias": False}
    with pytest.raises(ValueError, match=r"for each of 4 experts, but the DenseStack .* for each of 5 experts"):
        tensormix.hf.install_empty(make("qwen3_moe"), {f"{experts_of(1)}.down": entry})
