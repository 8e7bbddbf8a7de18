"""Bits in memory are bits on disk, to the last one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from tensormix.compression import compress
from tensormix.compression.kinds import planned_units
from tensormix.models import skeleton
from tensormix.operators import Dense, Quantized, StructuredLinear
from tensormix.operators.quantized import on_meta
from tensormix.plan import Plan
from tensormix.storage.bits import checkpoint_bits, stored_bits
from zoo import load_saved, logits, make, token_ids

I, O = 48, 80
RTN = {"name": "rtn", "bits": 4, "group": 16}
PLANS = {
    "dense": [],
    "mixt": [{"blocks": "1-2", "method": {"name": "mixt", "num_branches": 3}}],
    "rtn": [{"blocks": "1-2", "method": RTN}],
    "rtn_of_mixt": [{"blocks": "1-2", "method": {**RTN, "of": {"name": "mixt", "num_branches": 3}}}],
    "mixed": [
        {"blocks": "0", "method": {**RTN, "bits": 3, "symmetric": False, "of": {"name": "svd", "keep": 0.5}}},
        {"blocks": "1", "method": {"name": "mean_output"}},
        {"blocks": "2", "method": {"name": "drop_blocks"}},
        {"blocks": "3", "method": {"name": "rtn", "bits": 2, "granularity": "tensor"}},
    ],
}
FAMILIES = ["llama", "qwen3", "gpt2"]  # plain, with tied embeddings, with transposed layers and biases


def compressed(family, plan, **changes):
    model = make(family, **changes)
    compress(model, Plan.model_validate(PLANS[plan]), [token_ids()])
    return model


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_in_memory_are_bits_on_disk(family, plan, tmp_path):
    model = compressed(family, plan)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if family == "llama" else "10KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (family == "llama")
    bits = stored_bits(model)
    assert checkpoint_bits(tmp_path) == bits == stored_bits(model.state_dict())
    assert stored_bits(load_saved(tmp_path)) == bits
    assert stored_bits(skeleton(tmp_path)) == bits
    size = 8 * sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert bits < size < bits + 8 * 20_000  # the headers


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_are_counted_by_their_own_number(family):
    model = compressed(family, "mixed")
    operators = {name: part for name, part in model.named_modules() if isinstance(part, StructuredLinear)}
    inside = tuple(f"{name}." for name in operators)
    rest = sum(32 * p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    biases = sum(32 * part.bias.numel() for part in operators.values() if part.bias is not None)
    assert len(operators) >= 10
    assert stored_bits(model) == rest + biases + sum(part.num_bits for part in operators.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_are_the_published_formula(bits):
    """bits * numel + 16 for a matrix with one scale: 48 * 80 numbers fill whole words."""
    dense = Dense.from_dense(torch.randn(O, I))
    count = O * I
    assert Quantized.of(dense, bits=bits, group="tensor").num_bits == bits * count + 16
    assert Quantized.of(dense, bits=bits, group="channel").num_bits == bits * count + 16 * O
    assert Quantized.of(dense, bits=bits, group=16).num_bits == bits * count + 16 * O * 3
    assert Quantized.of(dense, bits=bits, group=20).num_bits == bits * count + 16 * O * 3  # 20 + 20 + 8
    assert Quantized.of(dense, bits=bits, group=128).num_bits == bits * count + 16 * O
    assert Quantized.of(dense, bits=bits, group=16, symmetric=False).num_bits == bits * count + (16 + bits) * O * 3


def test_an_odd_matrix_is_padded_to_a_whole_word():
    op = Quantized.of(Dense.from_dense(torch.randn(3, 3)), bits=3, group="tensor")
    assert op.num_bits == 2 * 24 + 16  # 9 numbers, 8 in a word of 24 bits


def test_a_dense_operator_is_the_matrix():
    weight = torch.randn(O, I, dtype=torch.bfloat16)
    op = Dense.from_dense(weight)
    assert torch.equal(op.to_dense(), weight) and op.to_dense() is not op.matrix
    x = torch.randn(3, I, dtype=torch.bfloat16)
    assert torch.equal(op(x), F.linear(x, weight))
    assert (op.num_params, op.num_bits, op.macs_per_token) == (O * I, 16 * O * I, O * I)


def test_on_meta_copies_shapes_and_ties_but_no_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    empty = on_meta(model)
    assert {p.device.type for p in empty.parameters()} == {"meta"} and model[0].weight.device.type == "cpu"
    assert empty[0].weight is empty[1].weight
    assert [p.requires_grad for p in empty.parameters()] == [True, False, True]


def test_tied_embeddings_are_counted_once():
    tied, free = make("qwen3"), make("qwen3", tie_word_embeddings=False)
    embedding = 32 * tied.get_input_embeddings().weight.numel()
    assert stored_bits(free) - stored_bits(tied) == embedding
    assert stored_bits(tied) == 32 * sum(p.numel() for p in tied.parameters())


def test_parts_of_one_memory_count_for_themselves():
    whole = torch.zeros(10)
    assert stored_bits({"a": whole, "b": whole}) == 320
    assert stored_bits({"a": whole[:5], "b": whole[5:]}) == 320
    assert stored_bits({"a": torch.zeros(0), "b": torch.zeros(0)}) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_bits_in_another_dtype_are_those_after_the_cast(plan, dtype, tmp_path):
    model = compressed("qwen3", plan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    foreseen = stored_bits(model, dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert foreseen != stored_bits(model)
    model.to(dtype).save_pretrained(tmp_path)
    assert foreseen == stored_bits(model) == checkpoint_bits(tmp_path)
    assert stored_bits(skeleton(tmp_path), dtype) == foreseen


def test_a_state_cannot_say_what_another_dtype_costs():
    with pytest.raises(ValueError, match=r"stored_bits: a dtype needs the model; its state does not say which"):
        stored_bits(make("llama").state_dict(), torch.bfloat16)


def test_a_checkpoint_in_small_floats_is_counted_as_it_lies_there(tmp_path):
    """fp8 with its scales, and blocks of four-bit floats: no table of dtypes is asked."""
    save_file(
        {
            "a.weight": torch.zeros(8, 16, dtype=torch.float8_e4m3fn),
            "a.weight_scale_inv": torch.zeros(1, 1),
            "b_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8),
            "b_scales": torch.zeros(2, 3, dtype=torch.uint8),
            "norm.weight": torch.zeros(16, dtype=torch.bfloat16),
        },
        tmp_path / "model.safetensors",
    )
    assert checkpoint_bits(tmp_path) == 8 * 8 * 16 + 32 + 8 * 2 * 3 * 16 + 8 * 2 * 3 + 16 * 16


def test_only_the_files_of_the_index_are_counted(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    save_file({"everything.again": torch.zeros(1000)}, tmp_path / "consolidated.safetensors")
    assert checkpoint_bits(tmp_path) == stored_bits(model)


def test_a_folder_without_whole_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        checkpoint_bits(tmp_path)
    model = make("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut off"):
        checkpoint_bits(tmp_path)


# Models with integers in them, saved and loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_models_come_back_bit_equal(family, dtype, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    model = load_saved(tmp_path / "dense", dtype=dtype)
    compress(model, Plan.model_validate(PLANS["mixed"]), [token_ids()])
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    again = load_saved(tmp_path, dtype="auto")
    assert again.dtype == dtype and torch.equal(logits(again), logits(model))
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.numel() == 0 or (tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]))
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load_saved(tmp_path / "twice", dtype="auto")), logits(model))


def test_loading_in_another_dtype_moves_no_integer_and_no_scale(tmp_path):
    model = compressed("llama", "rtn_of_mixt")
    model.save_pretrained(tmp_path)
    part = "model.layers.1.mlp.up_proj"
    for dtype in (torch.bfloat16, torch.float16):
        again = load_saved(tmp_path, dtype=dtype)
        op, original = again.get_submodule(part), model.get_submodule(part)
        assert isinstance(op, Quantized) and op.to_dense().dtype == dtype
        assert {t.dtype for t in op.state_dict().values() if t.numel()} == {torch.uint8, torch.bfloat16}
        for name, tensor in op.state_dict().items():
            assert tensor.numel() == 0 or torch.equal(tensor, original.state_dict()[name])


def test_a_device_map_and_generation_work(tmp_path):
    model = compressed("qwen3", "mixed")
    model.save_pretrained(tmp_path)
    again = load_saved(tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(again), logits(model))
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(token_ids(), **options), model.generate(token_ids(), **options))
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_becomes_dense_again(family, tmp_path):
    model = compressed(family, "rtn_of_mixt")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    model = load_saved(tmp_path)
    model.dequantize()
    assert not any(isinstance(part, StructuredLinear) for part in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_the_config_of_a_quantized_model_is_plain(tmp_path):
    compressed("llama", "rtn_of_mixt").save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["operators"]
    assert entry["model.layers.1.mlp.down_proj"] == {
        "operator": "Quantized",
        "inner": {
            "operator": "MixT", "in_features": 48, "out_features": 32, "num_branches": 3, "bond": 2,
            "padding": "multiple",
        },
        "bits": 4, "group": 16, "symmetric": True, "bias": False,
    }  # fmt: skip


@pytest.mark.parametrize("method", [{"name": "svd", "keep": 0.5}, RTN], ids=lambda method: method["name"])
def test_what_a_site_will_take_is_known_before_anything_is_fitted(method):
    """Floats in the dtype of the weight, half the width of what an empty operator is made in; integers in their own."""
    model = make("llama").to(torch.bfloat16)
    plan = Plan.model_validate([{"method": method}])
    foreseen = {name: cost.bits for unit in planned_units(model, plan) for name, cost in unit.costs().items()}
    assert foreseen == {row["site"]: row["bits"] for row in compress(model, plan)}
