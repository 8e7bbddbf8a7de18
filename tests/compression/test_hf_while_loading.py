"""Compressing while a checkpoint is read gives what compressing the loaded model gives, and needs less memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import tensormix.hf
from tensormix.compression import compress
from tensormix.compression.while_loading import CompressConfig
from tensormix.models import load_model
from tensormix.operators import StructuredLinear
from tensormix.plan import Plan
from zoo import MOE, ZOO, logits, make, token_ids

# One block of each kind of operator; every family has projections with these roles.
MIXED = Plan.model_validate(
    [
        {"blocks": "0", "method": {"name": "mixt", "num_branches": 3}},
        {"blocks": "1", "method": {"name": "zero"}},
        {"blocks": "2", "method": {"name": "drop_blocks"}},
        {"blocks": "3", "sites": ["o", "down"], "method": {"name": "svd", "keep": 0.5}},
    ]
)
SVD = Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.5}}])
DROP = Plan.model_validate([{"blocks": "last 2", "method": {"name": "drop_blocks"}}])


def save(folder, family, dtype=torch.float32, **options):
    make(family).to(dtype).save_pretrained(folder, **options)
    return folder


def while_loading(folder, plan, dtype="auto", **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressConfig(plan), dtype=dtype, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


def afterwards(folder, plan, dtype="auto"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    compress(model, plan)
    return model


def assert_same(model, expected):
    """Everything that is saved, its layout, and the logits, to the bit; of copies, because sums round by where a tensor
    begins in its file."""
    tensors, wanted = model.state_dict(), expected.state_dict()
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
        assert tensor.stride() == wanted[name].stride(), name
    assert torch.equal(logits(copy.deepcopy(model)), logits(copy.deepcopy(expected)))


@pytest.mark.parametrize("family", ZOO)
def test_it_is_what_compress_makes_of_the_loaded_model(family, tmp_path):
    save(tmp_path, family)
    model = while_loading(tmp_path, MIXED)
    assert_same(model, afterwards(tmp_path, MIXED))
    assert sum(isinstance(module, StructuredLinear) for module in model.modules()) > 8
    assert not any(parameter.is_meta for parameter in model.parameters())


EXPERTS = {
    "both": [{"blocks": "1-2", "method": {"name": "mixt", "num_branches": 2}}],
    "down": [{"blocks": "1-2", "sites": r".*\.experts\.down", "method": {"name": "svd", "keep": 0.7}}],
    "into": [{"blocks": "1-2", "sites": r".*\.experts\.gate_up", "method": {"name": "svd", "keep": 0.7}}],
    "none": [{"blocks": "1", "sites": ["o"], "method": {"name": "zero"}}],
}


@pytest.mark.parametrize("stacks", EXPERTS)
@pytest.mark.parametrize("family", MOE)
def test_experts(family, stacks, tmp_path):
    """Merged from a tensor for each expert on disk, or stored as one, with biases and without."""
    save(tmp_path / "dense", family)
    plan = Plan.model_validate([*EXPERTS[stacks], {"blocks": "3", "method": {"name": "drop_blocks"}}])
    model = while_loading(tmp_path / "dense", plan)
    assert_same(model, afterwards(tmp_path / "dense", plan))
    assert len(model.config.quantization_config.operators) > 1
    model.save_pretrained(tmp_path / "small")
    assert_same(load_model(tmp_path / "small"), model)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [(torch.bfloat16, "auto"), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_every_dtype(family, stored, asked, tmp_path):
    save(tmp_path, family, stored)
    assert_same(while_loading(tmp_path, MIXED, asked), afterwards(tmp_path, MIXED, asked))


def test_from_shards_and_onto_a_device(tmp_path):
    save(tmp_path, "gpt2", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(while_loading(tmp_path, MIXED, device_map={"": "cpu"}), afterwards(tmp_path, MIXED))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_it_is_saved_and_loaded_like_any_compressed_model(family, tmp_path):
    """The config holds operators, never the plan."""
    model = while_loading(save(tmp_path / "dense", family), MIXED)
    model.save_pretrained(tmp_path / "small")
    assert_same(load_model(tmp_path / "small"), model)
    afterwards(tmp_path / "dense", MIXED).save_pretrained(tmp_path / "usual")
    small, usual = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "usual"))
    assert small == usual and small["quantization_config"]["quant_method"] == "tensormix"


def test_it_is_an_ordinary_float_model(tmp_path):
    model = while_loading(save(tmp_path, "llama"), SVD)
    assert not model.is_quantized and not model.training
    assert not any(getattr(getattr(module, "config", None), "_is_quantized", False) for module in model.modules())
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}
    assert all(parameter.requires_grad for parameter in model.parameters())
    compress(model, Plan.model_validate([{"blocks": "3", "method": {"name": "zero"}}]))
    model.float().dequantize()
    assert not any(isinstance(module, StructuredLinear) for module in model.modules())


def test_an_architecture_that_initialises_whatever_it_meets(tmp_path, monkeypatch):
    """transformers fills what no tensor was read for, and the operators' numbers were read from nowhere."""

    def fill(_model, module):
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            torch.nn.init.ones_(tensor)

    save(tmp_path, "llama")
    expected = afterwards(tmp_path, MIXED)
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", fill)
    tensors, wanted = while_loading(tmp_path, MIXED).state_dict(), expected.state_dict()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_tied_embeddings_stay_tied(tmp_path):
    model = while_loading(save(tmp_path, "qwen3"), MIXED)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_dropped_blocks_alone(family, tmp_path):
    model = while_loading(save(tmp_path, family), DROP)
    assert_same(model, afterwards(tmp_path, DROP))
    assert len(model(token_ids(), output_hidden_states=True).hidden_states) == 5


def test_an_empty_plan_leaves_the_dense_model(tmp_path):
    model = while_loading(save(tmp_path, "llama"), Plan())
    assert_same(model, make("llama"))
    assert getattr(model.config, "quantization_config", None) is None and not model.is_quantized


# What is refused.


@pytest.mark.parametrize(
    ("name", "needs"), [({"name": "mean_output"}, "InputMean"), ({"name": "svd_llm", "keep": 0.5}, "Gram")]
)
def test_methods_that_need_calibration(name, needs):
    plan = Plan.model_validate([{"blocks": "0", "method": {"name": "zero"}}, {"blocks": "1", "method": name}])
    sentence = (
        rf"{name['name']} needs calibration \({needs}\), and while a checkpoint is loaded there are only weights: use "
        r"`tensormix run`, or load the model first and call compress\(model, plan, batches\)"
    )
    with pytest.raises(ValueError, match=sentence):
        CompressConfig(plan)


def test_a_plan_that_does_not_fit(tmp_path):
    save(tmp_path, "llama")
    plan = Plan.model_validate([{"blocks": "9", "method": {"name": "zero"}}])
    with pytest.raises(ValueError, match=r"plan\[0\]: blocks '9' asks for block 9; the model has 4 blocks"):
        while_loading(tmp_path, plan)


def test_sizes_that_do_not_fit(tmp_path):
    save(tmp_path, "llama")
    plan = Plan.model_validate([{"blocks": "1", "sites": ["k"], "method": {"name": "svd", "keep": 0.01}}])
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.k_proj: Svd: keep=0.01 leaves no rank"):
        while_loading(tmp_path, plan)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_are_not_finite(family, tmp_path):
    save(tmp_path, family)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("1.mlp.down_proj.weight", "1.mlp.c_proj.weight")))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    site = name.removesuffix(".weight")
    with pytest.raises(ValueError, match=f"{site}: the weight holds NaN or infinite values; nothing was changed"):
        while_loading(tmp_path, SVD)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_weights_that_are_missing(lost, tmp_path):
    save(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights of {lost.removesuffix('.weight')}: it is incomplete"):
        while_loading(tmp_path, SVD)


def test_what_is_compressed_already(tmp_path):
    while_loading(save(tmp_path / "dense", "llama"), SVD).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="quantized with StructuredConfig but you are passing a CompressConfig"):
        while_loading(tmp_path / "small", DROP)


MEASURE = """
import sys, threading, time
sys.path.insert(0, {source!r})
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from tensormix.plan import Plan
from tensormix.compression.while_loading import CompressConfig

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def peak_of(load):
    start = peak = anonymous()
    done = threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model = load()
    finally:
        done.set()
        thread.join()
    return peak - start, sum(parameter.nbytes for parameter in model.parameters())

def write(folder, width, blocks):
    config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks, vocab_size=64,
                         num_attention_heads=4, num_key_value_heads=4, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {{n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}}
    numbers = torch.randn(3 * width * width).bfloat16()
    tensors = {{name: numbers[: shape.numel()].clone().view(shape) for name, shape in shapes.items()}}
    config.save_pretrained(folder)
    save_file(tensors, folder + "/model.safetensors", {{"format": "pt"}})

plan = Plan.model_validate([
    {{"sites": ["q", "k", "v", "o"], "method": {{"name": "mixt", "num_branches": 3}}}},
    {{"sites": ["gate", "up", "down"], "method": {{"name": "zero"}}}},
])
def small(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=CompressConfig(plan))
write({folder!r} + "/warm", 32, 1)
write({folder!r} + "/big", 1024, 4)
small({folder!r} + "/warm")
print(*peak_of(lambda: small({folder!r} + "/big")))
print(*peak_of(lambda: AutoModelForCausalLM.from_pretrained({folder!r} + "/big", dtype=torch.float32)))
"""


def test_the_dense_model_is_never_in_memory(tmp_path):
    """Stored in bf16 and loaded in fp32, so that no weight can stay where the file is mapped."""
    code = MEASURE.format(source=str(Path(tensormix.__file__).parents[1]), folder=str(tmp_path))
    # without these the allocator keeps what was freed, more or less of it from run to run
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command, options = (
        [sys.executable, "-W", "ignore", "-c", code],
        {"capture_output": True, "text": True, "timeout": 300},
    )
    done = subprocess.run(command, **options, env={**os.environ, **exact})
    assert done.returncode == 0, done.stderr[-2000:]
    (peak, compressed), (dense_peak, dense) = (map(int, line.split()) for line in done.stdout.splitlines())
    largest = 4 * 3 * 1024 * 1024
    assert compressed < dense / 10 and dense > 200e6
    assert peak < compressed + 6 * largest  # the weight, its dense form after the fit, their difference, in fp64 too
    assert dense_peak > 0.95 * dense  # so the bound means something
