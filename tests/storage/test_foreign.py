"""Weights that other programs stored as codes: what is read is what their formulas say, or a sentence says why not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import ModelSource, load_model
from tensormix.plan import Plan
from tensormix.storage.foreign import Foreign
from tensormix.storage.packed import pack_of
from zoo import logits, make

PLAN = Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.5}}])
GROUP = 8


def random(*shape, low=0, high=16):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(codes, bits=4, order=tuple(range(8))):
    """Numbers of a row, so many in an int32, written bit by bit as the programs document it; (R, C) -> (R, C / n)."""
    per, rows = 32 // bits, []
    for row in codes.tolist():
        words = [row[i : i + per] for i in range(0, len(row), per)]
        values = [sum(word[order[place]] << (bits * place) for place in range(len(word))) for word in words]
        rows.append([value - (1 << 32) if value >= 1 << 31 else value for value in values])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(O, I, act_order=False):
    codes, zeros = random(O, I), random(I // GROUP, O, low=1)
    scales = (random(I // GROUP, O, high=9) + 1).half() / 64
    groups = torch.arange(I).flip(0) // GROUP if act_order else torch.arange(I) // GROUP
    weight = (codes - zeros.t()[:, groups]) * scales.float().t()[:, groups]
    # packed along the inputs
    parts = {"qweight": packed(codes).t().contiguous(), "qzeros": packed(zeros - 1)}
    return weight, {**parts, "scales": scales, "g_idx": groups.int()}


def awq(O, I):
    codes, zeros = random(O, I), random(I // GROUP, O)
    scales, groups = (random(I // GROUP, O, high=9) + 1).half() / 64, torch.arange(I) // GROUP
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    weight = (codes - zeros.t()[:, groups]) * scales.float().t()[:, groups]
    parts = {"qweight": packed(codes.t().contiguous(), order=order), "qzeros": packed(zeros, order=order)}
    return weight, {**parts, "scales": scales}


def pack_quantized(O, I, bits=4, symmetric=True):
    half = 2 ** (bits - 1)
    codes, zeros = random(O, I, high=2 * half), random(O, I // GROUP, high=2 * half)
    scales, groups = ((random(O, I // GROUP, high=9) + 1) / 64).bfloat16(), torch.arange(I) // GROUP
    signed = codes - half if symmetric else codes - zeros[:, groups]
    parts = {"weight_packed": packed(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor([O, I])}
    beside = {} if symmetric else {"weight_zero_point": packed(zeros.t(), bits).t().contiguous()}
    return (signed.bfloat16() * scales[:, groups]).float(), {**parts, **beside}  # as the program itself multiplies


def whole(O, I, dtype, scale):
    codes = (random(O, I, high=200) - 100).to(dtype)
    rows = scale.expand(O, 1).float() if scale.dim() else scale.float()
    return codes.float() * rows, {"weight": codes, "weight_scale": scale.clone(), "input_scale": torch.ones(1)}


def ct(format, **weights):
    group = {"weights": {"num_bits": 4, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
PER_ROW = torch.tensor(1 / 64)
LAYOUTS = {
    "gptq": (GPTQ, gptq),
    "gptq, columns in another order": (GPTQ, lambda O, I: gptq(O, I, act_order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "int4": (ct("pack-quantized"), pack_quantized),
    "int4 with zeros": (ct("pack-quantized"), lambda O, I: pack_quantized(O, I, symmetric=False)),
    "int8, four in an int32": (ct("pack-quantized"), lambda O, I: pack_quantized(O, I, bits=8)),
    "int8": (ct("int-quantized"), lambda O, I: whole(O, I, torch.int8, torch.rand(O, 1) + 0.5)),
    "fp8 by row": (ct("float-quantized"), lambda O, I: whole(O, I, torch.float8_e4m3fn, torch.rand(O, 1) + 0.5)),
    "fp8 of modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda O, I: whole(O, I, torch.float8_e4m3fn, PER_ROW),
    ),
}


def save(folder, config, layout, family="qwen3"):
    """Two folders: one whose linear layers are stored by `layout`, and one with what they stand for."""
    make(family).save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    coded, plain = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        plain[name], parts = layout(*tensors[name].shape)
        del coded[name]
        coded |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    (folder / "coded").mkdir()
    for where, found in (("plain", plain), ("coded", coded)):
        found = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(found, folder / where / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "coded" / "config.json").write_text(json.dumps({**text, "quantization_config": config}))
    return folder / "coded", folder / "plain"


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_in_memory_and_what_the_codes_stand_for(layout, tmp_path):
    coded, plain = save(tmp_path, *LAYOUTS[layout])
    model, expected = load_model(coded), load_model(plain)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    rows = compress_checkpoint(coded, tmp_path / "out", PLAN)
    compress(model, PLAN)
    streamed = load_model(tmp_path / "out")
    tensors = streamed.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert {entry.dtype for entry in ModelSource(tmp_path / "out").entries.values()} == {"F32"}, "nothing stays packed"
    assert sum(row["dense_bits"] for row in rows) < 20 * sum(row["dense_parameters"] for row in rows)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "tensormix" and "packed" not in config
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(streamed))


def test_single_experts_of_a_stack(tmp_path):
    coded, plain = save(tmp_path, *LAYOUTS["gptq"], family="qwen3_moe")
    assert torch.allclose(logits(load_model(coded)), logits(load_model(plain)), atol=1e-5)
    compress_checkpoint(coded, tmp_path / "out", PLAN)
    compress_checkpoint(plain, tmp_path / "expected", PLAN)
    assert torch.allclose(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "expected")), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "details"),
    [
        ({**GPTQ, "bits": 3}, r"'gptq' \(bits 3\)"),
        ({**GPTQ, "checkpoint_format": "marlin"}, r"'gptq' \(bits 4, checkpoint_format 'marlin'\)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"'awq' \(bits 4, version 'gemv'\)"),
        (ct("nvfp4-pack-quantized"), r"'compressed-tensors' \(format 'nvfp4-pack-quantized'\)"),
        (
            {**ct("pack-quantized"), "transform_config": {"hadamard": 1}},
            r"'compressed-tensors' \(format 'pack-quantized'\)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"'modelopt' \(quant_algo 'NVFP4'\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"'bitsandbytes' \(load_in_8bit True\)"),
    ],
)
def test_a_layout_that_is_not_read_is_named(config, details):
    with pytest.raises(ValueError, match=rf"the checkpoint is packed as {details}; plain weights"):
        pack_of(config)


def test_a_part_that_is_missing(tmp_path):
    coded, _ = save(tmp_path, *LAYOUTS["gptq"])
    tensors = load_file(coded / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.scales"]
    save_file(tensors, coded / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight is packed, but model.layers.2.mlp.up_proj.scales is missing"):
        load_model(coded)


def test_parts_that_do_not_fit(tmp_path):
    coded, _ = save(tmp_path, *LAYOUTS["gptq"])
    text = json.loads((coded / "config.json").read_text())
    text["quantization_config"]["bits"] = 8
    (coded / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"qweight has the shape \(.*\), but config.json implies"):
        load_model(coded)


def test_a_zero_below_nought_is_read_in_two_ways():
    _, parts = gptq(16, 32)
    parts["qzeros"] = packed(torch.full((4, 16), 15))
    with pytest.raises(ValueError, match="a zero is stored as one below nought"):
        Foreign("gptq", above=1).unpack(parts, torch.float32)


def test_scales_that_are_not_finite_or_of_another_shape():
    _, parts = awq(16, 32)
    with pytest.raises(ValueError, match=r"awq: 64 of 64 scales are not finite"):
        Foreign("awq").unpack({**parts, "scales": parts["scales"] * float("nan")}, torch.float32)
    _, parts = whole(16, 32, torch.int8, PER_ROW)
    with pytest.raises(ValueError, match=r"scales of shape \(3, 5\) do not fit a 16x32 weight"):
        Foreign("compressed-tensors").unpack({**parts, "weight_scale": torch.ones(3, 5)}, torch.float32)


def test_blocks_that_share_a_scale():
    codes, scale = torch.ones(6, 8).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = Foreign("compressed-tensors", block=(4, 4)).unpack({"weight": codes, "weight_scale": scale}, torch.float32)
    assert found[0].tolist() == [1.0] * 4 + [2.0] * 4 and found[5].tolist() == [3.0] * 4 + [4.0] * 4
