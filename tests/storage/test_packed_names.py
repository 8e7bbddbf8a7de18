"""Which pack a config names, which stored tensors make one weight, and what is said when they do not."""

from __future__ import annotations

import pytest
import torch

from packed_checkpoints import fp8_config
from tensormix.storage.packed import FP8, Pack, dequantize_fp8, dequantize_mxfp4, pack_of


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        ({}, None),
        (fp8_config(), Pack("fp8", (128, 128))),
        (fp8_config(None), Pack("fp8")),
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32]}, Pack("fp8", (64, 32))),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, Pack("mxfp4")),
    ],
)
def test_which_pack(config, expected):
    assert pack_of(config) == expected


OTHERS = ["gptq", "awq", "bitsandbytes", "torchao", "compressed-tensors", "mxfp8", None]


@pytest.mark.parametrize("method", OTHERS)
def test_packs_that_are_not_read(method):
    sentence = (
        rf"the checkpoint is packed as {method!r}.*; plain weights, 'fp8', 'mxfp4', and of .* can be read. Take the "
        r"model's original checkpoint, or convert this one .*dequantize\(\), save_pretrained\(new_folder\)"
    )
    with pytest.raises(ValueError, match=sentence):
        pack_of({"quant_method": method, "bits": 3})


def test_fp8_with_experts_in_fp4_is_not_read():
    with pytest.raises(ValueError, match=r"packed as 'fp8' with experts in 'fp4'; plain weights, 'fp8', 'mxfp4'"):
        pack_of(fp8_config() | {"expert_dtype": "fp4"})


@pytest.mark.parametrize("block", [[128], [0, 128]])
def test_a_block_size_that_is_none(block):
    with pytest.raises(ValueError, match="weight_block_size must be two numbers from 1 on, got"):
        pack_of(fp8_config() | {"weight_block_size": block})


FP8_NAMES = {"a.q_proj.weight", "a.q_proj.weight_scale_inv", "a.norm.weight", "a.o_proj.weight", "a.bias"}
FP8_NAMES |= {"a.o_proj.weight_scale_inv", "a.o_proj.activation_scale", "e.gate_up_proj", "e.gate_up_proj_scale_inv"}
MXFP4_NAMES = {"e.down_proj_blocks", "e.down_proj_scales", "e.down_proj_bias", "a.q_proj.weight"}


@pytest.mark.parametrize(
    ("pack", "stored", "name", "expected"),
    [
        ("fp8", FP8_NAMES, "a.q_proj.weight", {"weight": "a.q_proj.weight", "scale": "a.q_proj.weight_scale_inv"}),
        ("fp8", FP8_NAMES, "a.norm.weight", {"weight": "a.norm.weight"}),
        ("fp8", FP8_NAMES, "a.bias", {"weight": "a.bias"}),
        (
            "fp8",
            FP8_NAMES,
            "a.o_proj.weight",
            {
                "weight": "a.o_proj.weight",
                "scale": "a.o_proj.weight_scale_inv",
                "activation_scale": "a.o_proj.activation_scale",
            },
        ),
        ("fp8", FP8_NAMES, "e.gate_up_proj", {"weight": "e.gate_up_proj", "scale": "e.gate_up_proj_scale_inv"}),
        ("mxfp4", MXFP4_NAMES, "e.down_proj", {"blocks": "e.down_proj_blocks", "scales": "e.down_proj_scales"}),
        ("mxfp4", MXFP4_NAMES, "e.down_proj_bias", {"weight": "e.down_proj_bias"}),
        ("mxfp4", MXFP4_NAMES, "a.q_proj.weight", {"weight": "a.q_proj.weight"}),
    ],
)
def test_companions(pack, stored, name, expected):
    assert Pack(pack).companions(name, stored) == expected
    assert {Pack(pack).dense_name(part) for part in expected.values()} == {name}


@pytest.mark.parametrize(("pack", "stored"), [("fp8", FP8_NAMES), ("mxfp4", MXFP4_NAMES)])
def test_every_stored_tensor_belongs_to_exactly_one_weight(pack, stored):
    names = {Pack(pack).dense_name(name) for name in stored}
    parts = [part for name in names for part in Pack(pack).companions(name, stored).values()]
    assert sorted(parts) == sorted(stored)


@pytest.mark.parametrize(
    ("pack", "lost", "name"),
    [
        ("fp8", "a.q_proj.weight", "a.q_proj.weight"),
        ("mxfp4", "e.down_proj_scales", "e.down_proj"),
        ("mxfp4", "e.down_proj_blocks", "e.down_proj"),
    ],
)
def test_a_part_that_is_missing(pack, lost, name):
    stored = {"fp8": FP8_NAMES, "mxfp4": MXFP4_NAMES}[pack] - {lost}
    with pytest.raises(ValueError, match=f"{name} is packed, but {lost} is missing; the checkpoint is incomplete"):
        Pack(pack).companions(name, stored)


def test_unpacking_by_role():
    weight, scale = torch.randn(20, 12).to(FP8), torch.rand(3, 2)
    tensors = {"weight": weight, "scale": scale, "activation_scale": torch.tensor(9.0)}
    expected = dequantize_fp8(weight, scale, (8, 8), torch.float32)
    assert torch.equal(Pack("fp8", (8, 8)).unpack(tensors, torch.float32), expected)
    blocks, scales = torch.full((2, 3, 4, 16), 0x3A, dtype=torch.uint8), torch.full((2, 3, 4), 120, dtype=torch.uint8)
    unpacked = Pack("mxfp4").unpack({"blocks": blocks, "scales": scales}, torch.float16)
    assert unpacked.dtype == torch.float16
    assert torch.equal(unpacked, dequantize_mxfp4(blocks, scales, torch.float16))


def test_what_is_not_packed_is_cast():
    norm, index = torch.rand(5), torch.arange(5)
    assert torch.equal(Pack("fp8").unpack({"weight": norm}, torch.bfloat16), norm.to(torch.bfloat16))
    assert Pack("fp8").unpack({"weight": index}, torch.bfloat16).dtype == torch.int64


@pytest.mark.parametrize(
    ("pack", "dtype", "beside"),
    [("fp8", FP8, "'_scale_inv'"), ("fp8", torch.int8, "'_scale_inv'"), ("mxfp4", torch.uint8, "'_blocks' and '_sc")],
)
def test_codes_without_scales(pack, dtype, beside):
    sentence = f"stored as {str(dtype)[6:]} without scales; in a checkpoint packed as {pack} they lie beside .*{beside}"
    with pytest.raises(ValueError, match=sentence):
        Pack(pack).unpack({"weight": torch.zeros(4, 4, dtype=dtype)}, torch.bfloat16)
