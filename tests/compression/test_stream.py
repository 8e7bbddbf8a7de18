"""Streamed from disk to disk: to the bit what the walk in memory gives, and what is untouched goes byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.methods import DropBlocks, MeanOutput, Mixt, Svd
from tensormix.models import load_model
from tensormix.plan import Plan, Rule
from tensormix.sites.calls import Activations
from tensormix.storage.bits import checkpoint_bits
from tensormix.storage.formats import open_weights
from tensormix.storage.safetensors import INDEX
from zoo import MOE, NUM_BLOCKS, ZOO, make, token_ids

WEIGHTS_ONLY = Plan((Rule(method=Mixt(num_branches=2), blocks="last 2"),))
CALIBRATED = Plan(
    (
        Rule(method=DropBlocks(), blocks="1"),
        Rule(method=MeanOutput(), blocks="2"),
        Rule(method=Svd(keep=0.4), blocks="0"),
    )
)
BATCHES = [token_ids(seed=1), token_ids(seed=2, length=7)]


def saved(tmp_path: Path, family: str, shard: str = "1GB", **changes) -> Path:
    folder = tmp_path / "dense"
    make(family, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def in_memory(folder: Path, out: Path, plan: Plan, batches=None, dtype="auto", **options):
    model = load_model(folder, dtype=dtype)
    rows = compress(model, plan, batches, **options)
    model.save_pretrained(out)
    return rows


def assert_same_model(one: Path, other: Path, dtype: str = "auto") -> None:
    a, b = (load_model(folder, dtype=dtype) for folder in (one, other))
    for model in (a, b):  # mapped weights may lie at odd addresses, and products depend on that
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert tensor.dtype == b.state_dict()[name].dtype and torch.equal(tensor, b.state_dict()[name]), name
    assert torch.equal(a(token_ids(seed=5)).logits, b(token_ids(seed=5)).logits)


@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one_file", "many_files"])
@pytest.mark.parametrize("plan", [WEIGHTS_ONLY, CALIBRATED], ids=["weights_only", "calibrated"])
@pytest.mark.parametrize("family", [*ZOO, *MOE])
def test_the_same_to_the_bit_as_in_memory(tmp_path, family, plan, shard):
    folder = saved(tmp_path, family, shard)
    expected = in_memory(folder, tmp_path / "memory", plan, BATCHES)
    rows = compress_checkpoint(folder, tmp_path / "out", plan, BATCHES)
    assert timeless(rows) == timeless(expected)
    assert_same_model(tmp_path / "memory", tmp_path / "out")


@pytest.mark.parametrize("sites", [("gate_up",), ("down",), ("q", "o")], ids=["gate_up", "down", "attention"])
@pytest.mark.parametrize("family", MOE)
def test_one_stack_of_experts_or_none(tmp_path, family, sites):
    """The other stack of the block is passed on dense; where neither is compressed, every expert byte for byte."""
    if family == "deepseek_v3" and "q" in sites:
        sites = ("o",)
    plan = Plan((Rule(method=Svd(keep=0.6), blocks="1", sites=sites),))
    folder = saved(tmp_path, family)
    expected = in_memory(folder, tmp_path / "memory", plan)
    assert timeless(compress_checkpoint(folder, tmp_path / "out", plan)) == timeless(expected)
    assert_same_model(tmp_path / "memory", tmp_path / "out")


@pytest.mark.parametrize("options", [{"inputs": "dense"}, {"precision": torch.float32}], ids=["dense", "float32"])
def test_the_settings_of_calibration_reach_the_walk(tmp_path, options):
    folder = saved(tmp_path, "llama")
    expected = in_memory(folder, tmp_path / "memory", CALIBRATED, BATCHES, **options)
    assert timeless(compress_checkpoint(folder, tmp_path / "out", CALIBRATED, BATCHES, **options)) == timeless(expected)
    assert_same_model(tmp_path / "memory", tmp_path / "out")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtypes(tmp_path, stored, dtype):
    folder = tmp_path / "dense"
    make("qwen3").to(getattr(torch, stored)).save_pretrained(folder)
    in_memory(folder, tmp_path / "memory", CALIBRATED, BATCHES, dtype)
    compress_checkpoint(folder, tmp_path / "out", CALIBRATED, BATCHES, dtype=dtype)
    wanted = stored if dtype == "auto" else dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted
    assert_same_model(tmp_path / "memory", tmp_path / "out")


def test_without_a_plan_every_tensor_is_copied(tmp_path):
    folder = saved(tmp_path, "gpt2", "40KB")
    assert compress_checkpoint(folder, tmp_path / "out", Plan(())) == []
    before, after = open_weights(folder).entries, open_weights(tmp_path / "out").entries
    assert before.keys() == after.keys()
    assert all(list(before[n].chunks()) == list(after[n].chunks()) for n in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_what_the_model_does_not_know_passes_through(tmp_path):
    """Multi-token prediction heads, vision towers, and every file beside the weights."""
    folder = saved(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    strange = {
        "vision_tower.patch.weight": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "model.layers.4.mtp.weight": torch.randn(5).bfloat16(),  # a block after the last one
        "model.layers.3.mtp.weight": torch.arange(6),  # inside a block that is compressed
    }
    save_file({**tensors, **strange}, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    compress_checkpoint(folder, tmp_path / "out", WEIGHTS_ONLY, dtype="bfloat16")
    entries = open_weights(tmp_path / "out").entries
    for name, tensor in strange.items():
        assert entries[name].read().dtype == tensor.dtype
        assert torch.equal(entries[name].read().view(torch.uint8), tensor.view(torch.uint8))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_untouched_tensors_keep_a_dtype_of_their_own(tmp_path):
    """With "auto" a float32 norm in a bfloat16 checkpoint stays what it is on disk."""
    folder = tmp_path / "dense"
    make("llama").bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    compress_checkpoint(folder, tmp_path / "out", WEIGHTS_ONLY)
    kept = open_weights(tmp_path / "out").entries["model.norm.weight"].read()
    assert torch.equal(kept, tensors["model.norm.weight"])
    in_memory(folder, tmp_path / "memory", WEIGHTS_ONLY)
    assert_same_model(tmp_path / "memory", tmp_path / "out")


def test_a_compressed_checkpoint_can_be_compressed_further(tmp_path):
    folder = saved(tmp_path, "gptj")
    first = Plan((Rule(method=Svd(keep=0.5), blocks="3"), Rule(method=DropBlocks(), blocks="0")))
    second = Plan((Rule(method=Mixt(num_branches=2), blocks="1-3", sites=("up", "down")),))
    compress_checkpoint(folder, tmp_path / "first", first)
    with pytest.raises(ValueError, match="matches no site that is still dense"):
        compress_checkpoint(tmp_path / "first", tmp_path / "out", Plan((Rule(method=Svd(keep=0.5), blocks="3"),)))
    expected = in_memory(tmp_path / "first", tmp_path / "memory", second)
    assert timeless(compress_checkpoint(tmp_path / "first", tmp_path / "out", second)) == timeless(expected)
    assert_same_model(tmp_path / "memory", tmp_path / "out")


@pytest.mark.parametrize("workers", [2, 3])
def test_blocks_at_a_time_change_nothing(tmp_path, workers):
    folder, told = saved(tmp_path, "llama"), []
    plan = Plan((Rule(method=Mixt(num_branches=2, padding="power")),))
    one = compress_checkpoint(folder, tmp_path / "one", plan)
    more = compress_checkpoint(folder, tmp_path / "more", plan, workers=workers, progress=lambda *a: told.append(a))
    assert timeless(one) == timeless(more)
    assert [done for done, _, _ in told] == list(range(1, 7 * NUM_BLOCKS + 1))
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "more" / file.name).read_bytes(), file.name


def test_an_error_in_one_of_several_workers_is_raised(tmp_path):
    folder = saved(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj: the weight holds NaN or infinite values"):
        compress_checkpoint(folder, tmp_path / "out", Plan((Rule(method=Svd(keep=0.5)),)), workers=2)
    assert not (tmp_path / "out").exists()


def test_activations_on_disk_change_nothing(tmp_path):
    folder = saved(tmp_path, "gemma2")
    compress_checkpoint(folder, tmp_path / "memory", CALIBRATED, BATCHES)
    compress_checkpoint(folder, tmp_path / "spilled", CALIBRATED, BATCHES, spill=True)
    assert sorted(f.name for f in (tmp_path / "memory").iterdir()) == sorted(
        f.name for f in (tmp_path / "spilled").iterdir()
    )
    assert_same_model(tmp_path / "memory", tmp_path / "spilled")


def test_spilled_activations_are_files_without_a_name(tmp_path):
    keep = Activations(tmp_path / "activations")
    hidden = torch.randn(2, 3, 4).bfloat16()
    kept = keep.keep(hidden)
    assert torch.equal(kept, hidden) and kept.data_ptr() != hidden.data_ptr()
    assert not list((tmp_path / "activations").iterdir())
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "activations") in mapped


def test_the_index_lists_every_tensor_once(tmp_path):
    folder = saved(tmp_path, "llama")
    compress_checkpoint(folder, tmp_path / "out", CALIBRATED, BATCHES)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == NUM_BLOCKS + 1
    assert index["metadata"]["total_size"] == checkpoint_bits(tmp_path / "out") // 8


def test_a_hub_id_is_compressed_from_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--owner--name"
    make("llama").save_pretrained(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    compress_checkpoint("owner/name", tmp_path / "out", WEIGHTS_ONLY)
    compress_checkpoint(repository / "snapshots" / "abc123", tmp_path / "folder", WEIGHTS_ONLY)
    assert_same_model(tmp_path / "out", tmp_path / "folder")
    with pytest.raises(
        ValueError, match=r"'owner/other' could not be loaded: .* neither in the local cache nor to be had"
    ):
        compress_checkpoint("owner/other", tmp_path / "none", WEIGHTS_ONLY)
