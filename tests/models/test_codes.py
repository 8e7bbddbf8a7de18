"""Codes whose scales nothing declares are never taken for weights: the tensor is named, wherever a model is opened."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import load_model, skeleton
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.run.check import check
from zoo import logits, make

PLAN = Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.5}}])
OPENED = {
    "compress_checkpoint": lambda folder: compress_checkpoint(folder, folder.parent / "out", PLAN),
    "load_model": load_model,
    "check": lambda folder: check(Recipe.model_validate({"model": str(folder), "plan": PLAN.model_dump()})),
}


@pytest.fixture
def folder(tmp_path):
    make("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def store(folder, change):
    """Rewrite the tensors of a folder by `change`: name and tensor -> what is stored instead."""
    file = folder / "model.safetensors"
    stored = {}
    for name, tensor in load_file(file).items():
        stored |= change(name, tensor)
    save_file(stored, file, {"format": "pt"})


def coded(dtype, only="proj.weight"):
    def change(name, tensor):
        if not name.endswith(only):
            return {name: tensor}
        return {name: tensor.mul(10).abs().to(dtype), f"{name}_scale": torch.ones(1)}

    return change


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, torch.int32])
def test_codes_in_the_place_of_weights(dtype, opened, folder):
    store(folder, coded(dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"proj.weight is stored as {name}, and nothing in config.json says how it is s"
    ):
        OPENED[opened](folder)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("opened", OPENED)
def test_who_made_the_codes_is_said_where_a_file_says_it(opened, folder):
    store(folder, coded(torch.float8_e4m3fn, only="layers.3.mlp.up_proj.weight"))
    declaration = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(declaration))
    with pytest.raises(
        ValueError, match=r"layers.3.mlp.up_proj.weight .*hf_quant_config.json says that modelopt made .*FP8"
    ):
        OPENED[opened](folder)


@pytest.mark.parametrize("opened", OPENED)
def test_packed_codes_under_names_of_their_own(opened, folder):
    def packed(name, tensor):
        if not name.endswith("q_proj.weight"):
            return {name: tensor}
        stem = name.removesuffix("weight")
        return {f"{stem}qweight": torch.ones(4, 32, dtype=torch.int32), f"{stem}scales": torch.ones(1, 32)}

    store(folder, packed)
    with pytest.raises(
        ValueError, match=r"q_proj.qweight is stored as int32, and nothing in config.json says how it is"
    ):
        OPENED[opened](folder)


@pytest.mark.parametrize("opened", OPENED)
def test_declared_fp8_without_its_scale(opened, folder):
    store(folder, coded(torch.float8_e4m3fn, only="layers.0.mlp.up_proj.weight"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight:? (is )?stored as float8_e4m3fn"):
        OPENED[opened](folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "modelopt", "quanto", "hqq", "torchao", "aqlm"])
def test_a_way_to_pack_that_is_not_read_is_named(method, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    for opened in (*OPENED.values(), skeleton):
        with pytest.raises(ValueError, match=rf"the checkpoint is packed as '{method}'"):
            opened(folder)


def test_integers_that_are_no_weights_are_left_alone(folder, tmp_path):
    """Masks and positions of old releases, and codes that no parameter of the model is made of."""
    extra = {"model.layers.0.self_attn.mask": torch.ones(2, 2, dtype=torch.uint8), "v.patch": torch.ones(2, 2)}
    extra["v.patch"] = extra["v.patch"].to(torch.float8_e4m3fn)
    expected = logits(load_model(folder))
    store(folder, lambda name, tensor: {name: tensor, **(extra if name == "model.norm.weight" else {})})
    assert torch.equal(logits(load_model(folder)), expected)
    compress_checkpoint(folder, tmp_path / "out", PLAN)


def test_codes_in_memory():
    model = make("llama")
    up = model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj holds float8_e4m3fn: those are codes, not weights"
    ):
        compress(model, PLAN)


def test_a_model_that_peft_has_wrapped():
    """What is told by is where a class comes from: the package need not be there."""
    model = make("llama")
    wrapper = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})()
    wrapper.base_layer = model.model.layers[2].mlp.up_proj
    model.model.layers[2].mlp.up_proj = wrapper
    with pytest.raises(
        ValueError, match=r"layers.2.mlp.up_proj is wrapped by PEFT.*model = model.merge_and_unload\(\)"
    ):
        compress(model, PLAN)
