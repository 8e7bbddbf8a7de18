"""What is unpacked equals the definition of the formats, number by number, and what transformers makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tensormix.storage.packed import FP8, dequantize_fp8, dequantize_mxfp4

few = settings(deadline=None, max_examples=20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def e4m3(code: int) -> float:
    """The value of a float8_e4m3fn code: sign, four bits of exponent, three of mantissa; no infinities."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.nan if code & 127 == 127 else -size if sign else size


def e2m1(code: int) -> float:
    """The value of a four-bit code: sign, two bits of exponent, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float8_e4m3fn without NaN; every code occurs in a large one."""
    drawn = torch.randint(254, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn >= 127, drawn + 1, drawn).view(FP8)


def mxfp4(*shape: int, low: int = 100, high: int = 140, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks (*shape, 16) and scales (*shape)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float64).float().item()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right) and torch.equal(left.signbit(), right.signbit())


def test_the_oracle_of_fp8_is_that_of_torch():
    values = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    assert all(math.isnan(e4m3(c)) if v.isnan() else e4m3(c) == v.item() for c, v in enumerate(values))


@given(O=st.integers(1, 40), I=st.integers(1, 40), b=st.integers(1, 16), c=st.integers(1, 16), seed=st.integers(0, 99))
@few
def test_fp8_is_code_times_scale_of_its_block(O, I, b, c, seed):
    """Blocks at the edges are cut."""
    weight = codes(O, I, seed=seed)
    scale = torch.rand(math.ceil(O / b), math.ceil(I / c), generator=torch.Generator().manual_seed(seed))
    values = dequantize_fp8(weight, scale, (b, c), torch.float32)
    raw = weight.view(torch.uint8).tolist()
    expected = [[fp32(e4m3(raw[i][j]) * scale[i // b, j // c].item()) for j in range(I)] for i in range(O)]
    assert same_bits(values, torch.tensor(expected))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale(shape):
    weight = codes(300, 7)
    assert same_bits(dequantize_fp8(weight, torch.full(shape, 0.3), None, torch.float32), weight.float() * 0.3)
    assert same_bits(dequantize_fp8(weight, torch.full(shape, 0.3), (512, 512), torch.float32), weight.float() * 0.3)


@pytest.mark.parametrize("shape", [(300,), (300, 1)])
@pytest.mark.parametrize("block", [None, (128, 128)])
def test_fp8_with_one_scale_for_each_row(shape, block):
    weight, scale = codes(300, 150), torch.rand(shape)
    assert same_bits(dequantize_fp8(weight, scale, block, torch.float32), weight.float() * scale.view(300, 1))


def test_fp8_of_experts():
    weight, scale = codes(3, 20, 12), torch.rand(3, 3, 2)
    expected = torch.stack([dequantize_fp8(w, s, (8, 8)) for w, s in zip(weight, scale, strict=True)])
    assert same_bits(dequantize_fp8(weight, scale, (8, 8)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_equals_transformers(dtype):
    weight, scale = codes(384, 256), torch.rand(3, 2)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert same_bits(dequantize_fp8(weight, scale, (128, 128), dtype), theirs)


def test_fp8_with_powers_of_two_as_scales():
    """Scales in float8_e8m0fnu, as DeepSeek-V3.1 and later have them."""
    weight, scale = codes(20, 12), torch.tensor([[0.25, 2], [8, 1], [0.5, 4]])
    expected = dequantize_fp8(weight, scale, (8, 8))
    assert same_bits(dequantize_fp8(weight, scale.to(torch.float8_e8m0fnu), (8, 8)), expected)


@given(O=st.integers(1, 4), G=st.integers(1, 3), E=st.integers(1, 3), seed=st.integers(0, 99))
@few
def test_mxfp4_is_value_times_power_of_two(O, G, E, seed):
    blocks, scales = mxfp4(E, O, G, seed=seed)
    values = dequantize_mxfp4(blocks, scales, torch.float32)
    assert values.shape == (E, 32 * G, O) and values.is_contiguous()
    for e in range(E):
        for o in range(O):
            for i in range(32 * G):
                byte = blocks[e, o, i // 32, i % 32 // 2].item()
                code = byte >> 4 if i % 2 else byte & 15
                expected = math.ldexp(e2m1(code), scales[e, o, i // 32].item() - 127)
                assert values[e, i, o].item() == expected
                assert math.copysign(1, values[e, i, o].item()) == math.copysign(1, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), [(100, 140), (0, 20)], ids=["usual", "subnormal"])
def test_mxfp4_equals_transformers(dtype, low, high):
    blocks, scales = mxfp4(3, 64, 5, low=low, high=high)
    assert same_bits(dequantize_mxfp4(blocks, scales, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype))


def test_mxfp4_with_the_largest_scale():
    """6 * 2^127 is beyond fp32, 1.5 * 2^127 is not."""
    blocks, scales = torch.full((1, 2, 1, 16), 0x33, dtype=torch.uint8), torch.full((1, 2, 1), 254, dtype=torch.uint8)
    assert dequantize_mxfp4(blocks, scales, torch.float32).unique().tolist() == [1.5 * 2.0**127]
    with pytest.raises(ValueError, match="mxfp4: 64 of 64 values are too large for float32"):
        dequantize_mxfp4(blocks + 0x44, scales, torch.float32)


# What is refused.


def test_fp8_with_nan_codes():
    weight = codes(200, 9)
    weight.view(torch.uint8)[150, 3], weight.view(torch.uint8)[160, 4] = 0x7F, 0xFF
    with pytest.raises(ValueError, match=r"fp8: 2 of \d+ codes are NaN \(0x7f or 0xff\)"):
        dequantize_fp8(weight, torch.ones(()))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_fp8_with_scales_that_are_not_finite(bad):
    scale = torch.ones(4, 3)
    scale[3, 2] = bad
    with pytest.raises(ValueError, match="fp8: 1 of 12 scales are NaN or infinite"):
        dequantize_fp8(codes(30, 20), scale, (8, 8))


def test_fp8_that_is_too_large():
    weight = torch.full((2, 2), 448.0).to(FP8)
    with pytest.raises(ValueError, match="fp8: 2 of 4 values are too large for float16"):
        dequantize_fp8(weight, torch.tensor([[1.0], [1000.0]]), None, torch.float16)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (20,), (2, 20), (4, 3)])
def test_fp8_with_scales_of_another_shape(shape):
    sentence = (
        rf"fp8: scales of shape {shape} do not fit a 30x20 weight; allowed are \(4, 2\) for blocks of \(8, 16\), "
        r"\(30, 1\) for one per row, and a single one"
    ).replace(str(shape), str(shape).replace("(", r"\(").replace(")", r"\)"))
    with pytest.raises(ValueError, match=sentence):
        dequantize_fp8(codes(30, 20), torch.ones(shape), (8, 16))


def test_fp8_with_blocks_that_were_not_announced():
    with pytest.raises(ValueError, match=r"do not fit a 30x20 weight; allowed are \(30, 1\) for one per row, and a"):
        dequantize_fp8(codes(30, 20), torch.ones(4, 2), None)


def test_fp8_of_other_dtypes():
    with pytest.raises(ValueError, match="fp8: the weight must be float8_e4m3fn, got int8"):
        dequantize_fp8(torch.zeros(4, 4, dtype=torch.int8), torch.ones(()))
    with pytest.raises(ValueError, match=r"scales floating point, got \(4, 4\) and scales in uint8"):
        dequantize_fp8(codes(4, 4), torch.ones(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be \(O, I\) or \(E, O, I\) .* got \(4,\)"):
        dequantize_fp8(codes(4), torch.ones(()))
    with pytest.raises(ValueError, match=r"fp8: 3 experts, but scales of shape \(2, 1, 1\)"):
        dequantize_fp8(codes(3, 4, 4), torch.ones(2, 1, 1))


def test_mxfp4_with_nan_scales():
    blocks, scales = mxfp4(2, 3, 4)
    scales[1, 2, 3] = 255
    with pytest.raises(ValueError, match=r"mxfp4: 1 of 24 scales are NaN \(255\)"):
        dequantize_mxfp4(blocks, scales)


def test_mxfp4_of_other_shapes_and_dtypes():
    blocks, scales = mxfp4(2, 3, 4)
    with pytest.raises(ValueError, match=r"must be \(E, O, G, 16\) and the scales \(E, O, G\), got .* and \(2, 3, 3\)"):
        dequantize_mxfp4(blocks, scales[..., :3])
    with pytest.raises(ValueError, match=r"must be \(E, O, G, 16\) .* got \(2, 3, 4, 8\)"):
        dequantize_mxfp4(blocks[..., :8], scales)
    with pytest.raises(ValueError, match="mxfp4: blocks and scales must be uint8, got uint8 and float32"):
        dequantize_mxfp4(blocks, scales.float())


@pytest.mark.parametrize(
    ("unpack", "tensors"),
    [(dequantize_fp8, (codes(8, 512, 512), torch.ones(8, 4, 4))), (dequantize_mxfp4, mxfp4(8, 512, 16))],
    ids=["fp8", "mxfp4"],
)
def test_only_one_expert_is_ever_in_fp32(unpack, tensors):
    """By the sizes of everything that torch allocates on the way."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = unpack(*tensors)
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert result.nbytes in sizes  # so these are the sizes
    assert max(size for size in sizes if size != result.nbytes) <= 4 * result[0].numel()
