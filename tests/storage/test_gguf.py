"""GGUF: what a file holds is what the model was, or a sentence says what cannot be read."""

from __future__ import annotations

import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from gguf_files import FAMILIES, converted, tiny, write
from tensormix.models import load_model, skeleton
from tensormix.storage.bits import checkpoint_bits
from tensormix.storage.formats import open_weights
from tensormix.storage.gguf.numbers import is_readable

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
OURS = ("Q1_0",)  # of which the package gguf knows the size alone
NEVER_STORED = ("Q8_1", "Q8_K")  # what activations are rounded to while they are multiplied


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_read_back(family, tmp_path):
    """Names, rows, gains of norms and the config: all of it stands in the logits."""
    model = tiny(family)
    write(model, tmp_path / "m.gguf", family)
    read = load_model(tmp_path)
    assert torch.allclose(read(IDS).logits, model(IDS).logits, atol=1e-5)
    assert read.config.vocab_size == 64 and not read.training


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "llama biases", "qwen2", "gemma2", "phi3", "starcoder2", "stablelm", "mamba"]
)
def test_the_same_numbers_as_transformers_reads(family, tmp_path):
    write(tiny(family), tmp_path / "m.gguf", family, "Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ours = load_model(tmp_path).state_dict()
    assert all(torch.allclose(tensor, ours[name], rtol=1e-6, atol=0) for name, tensor in theirs.state_dict().items())


def every_type():
    return [kind for kind in gguf.GGMLQuantizationType if not kind.name.startswith("I") or "Q" in kind.name]


@pytest.mark.parametrize("kind", every_type(), ids=lambda kind: kind.name)
def test_every_type_that_stores_weights(kind, tmp_path):
    """Random bytes: whatever they stand for, it is what the package gguf says."""
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (4, 512 // per_block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 4)
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    if kind.name in NEVER_STORED:
        with pytest.raises(ValueError, match=rf"token_embd.weight is stored as {kind.name}, .*take another file"):
            open_weights(tmp_path)
        return
    weights = open_weights(tmp_path)
    (entry,) = weights.entries.values()
    assert entry.shape == (4, 512) and weights.bits(entry) == 8 * data.nbytes
    if kind.name in OURS:
        assert set(weights.read(entry)[0, :128].abs().tolist()) == {abs(float(data[0, :2].view(np.float16)[0]))}
        return
    plain = {"F64": np.float64}
    expected = data.view(plain[kind.name]) if kind.name in plain else gguf.dequantize(data, kind)
    expected = torch.from_numpy(np.array(expected)).view(4, 512)
    assert torch.equal(weights.read(entry).to(expected.dtype).nan_to_num(), expected.nan_to_num())


def test_one_bit_a_number(tmp_path):
    """Q1_0: the scale, and its sign number by number, the lowest bit first."""
    from tensormix.storage.gguf.numbers import _decoded

    codes = np.zeros((1, 18), dtype=np.uint8)
    codes[0, :2], codes[0, 2] = np.float16([0.5]).view(np.uint8), 0b00000101
    assert _decoded(codes, gguf.GGMLQuantizationType.Q1_0)[0, :4].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert is_readable(gguf.GGMLQuantizationType.Q1_0)


def test_bits_are_those_of_the_file_and_numbers_of_its_widest_kind(tmp_path):
    model = tiny("qwen2moe")
    write(model, tmp_path / "m.gguf", "qwen2moe", "Q4_0")
    num_bytes = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert checkpoint_bits(tmp_path) == 8 * int(num_bytes)
    assert skeleton(tmp_path).dtype == torch.float32, "codes stand for more than half precision holds"
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        write(model, tmp_path / "m.gguf", "qwen2moe", kind)
        assert skeleton(tmp_path).dtype == dtype
        assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {dtype}


def test_a_split_file_is_one_model(tmp_path):
    model, tensors = tiny("qwen2"), converted(tiny("qwen2"), "qwen2")
    write(model, tmp_path / "whole.gguf", "qwen2")
    whole = load_model(tmp_path).state_dict()
    writer = gguf.GGUFWriter(
        tmp_path / "part", "qwen2", split_max_tensors=len(tensors) // 2 + 1, small_first_shard=False
    )
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    for key, field in reader.fields.items():
        if key.startswith("qwen2."):
            value = field.contents()
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (tmp_path / "whole.gguf").unlink()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 2
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_model(tmp_path).state_dict().items())
    assert load_model(parts[1]).config.vocab_size == 64, "any part stands for all"
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"00002-of-00002.gguf is missing: .* is one of 2 parts of a model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("qwen2", {"pooling_type": 3}, r"qwen2.pooling_type = 3 may change what the model computes"),
        ("qwen2", {"attention__sliding_window": 4}, r"some of its blocks see a window only"),
        ("llama", {"rope__dimension_count": 4}, r"it turns 4 of the 8 numbers of a head"),
        ("llama", {"rope__scaling__type": "su"}, r"its rotary positions are scaled by 'su'"),
        ("llama", {"attention__causal": False}, r"it is of a kind that llama is not"),
        ("llama", {"attention__value_length": 4}, r"its keys and values are of different sizes"),
        ("llama", {"attention__head_count_kv": [2, 4]}, r"its blocks are of different sizes"),
        ("granite", {"attention__key_length": 16}, r"its heads are of 16, and those of granite of 8"),
    ],
)
def test_what_the_class_cannot_do_is_named(family, changes, sentence, tmp_path):
    write(tiny(family), tmp_path / "m.gguf", family, **changes)
    with pytest.raises(ValueError, match=rf"m.gguf cannot be read: {sentence}.*folder of safetensors instead"):
        skeleton(tmp_path)


def test_frequencies_that_are_not_those_of_llama_3(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_files._llama3", lambda *_: torch.linspace(1, 30, 32))
    write(tiny("llama scaled"), tmp_path / "m.gguf", "llama scaled")
    with pytest.raises(ValueError, match=r"its rotary frequencies \(rope_freqs.weight\) are none of Llama 3's"):
        skeleton(tmp_path)


def test_an_architecture_that_is_not_known_is_named(tmp_path):
    for name, sentence in (("rwkv7", "architecture 'rwkv7'.*known are bloom, command-r"), ("clip", "'clip'")):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", name)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
            step()
        with pytest.raises(ValueError, match=sentence):
            skeleton(tmp_path)


def test_a_tensor_that_is_not_known_is_named(tmp_path, monkeypatch):
    model, known = tiny("qwen2"), converted(tiny("qwen2"), "qwen2")
    monkeypatch.setattr("gguf_files.converted", lambda *_: {**known, "blk.0.attn_sinks.weight": torch.ones(4)})
    write(model, tmp_path / "m.gguf", "qwen2")
    with pytest.raises(ValueError, match=r"holds blk.0.attn_sinks.weight, and nothing is known of such a tensor"):
        skeleton(tmp_path)


def test_a_tensor_for_which_the_model_has_no_place_is_named(tmp_path, monkeypatch):
    """A bias of a class without biases, say: left out, the model would be another."""
    model, known = tiny("qwen2"), converted(tiny("qwen2"), "qwen2")
    monkeypatch.setattr("gguf_files.converted", lambda *_: {**known, "blk.1.ffn_down.bias": torch.ones(32)})
    write(model, tmp_path / "m.gguf", "qwen2")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.bias.*Qwen2ForCausalLM has no place for"):
        load_model(tmp_path)


def test_damage_is_said(tmp_path):
    file = tmp_path / "m.gguf"
    write(tiny("llama"), file, "llama")
    whole = file.read_bytes()
    for content, sentence in (
        (whole[:-100], "is damaged or cut off .*ends at byte"),
        (whole[:200], "is damaged or cut off .*header cannot be read"),
        (b"", "is damaged or cut off .it has 0 bytes"),
        (b"NOPE" + whole[4:], "is no GGUF file, whatever its name says"),
        (whole[:4] + struct.pack(">I", 3) + whole[8:], "is of version 50331648 of GGUF"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            open_weights(tmp_path)


def test_without_the_package_one_is_told_what_to_install(tmp_path, monkeypatch):
    write(tiny("llama"), tmp_path / "m.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"package gguf, which is not installed: pip install 'tensormix\[gguf\]'"):
        open_weights(tmp_path)
