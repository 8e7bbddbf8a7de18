"""Owners in models: saved, counted, copied, trained and loaded once, by transformers and block by block."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from owners import SharedBasis, across, attention, share
from plans import plan_of
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.hf import attach
from tensormix.methods import Svd, SvdLlm
from tensormix.models import load_model, load_tokenizer, skeleton
from tensormix.operators import OPERATORS, Operator, Quantized, View
from tensormix.profile import bytes_on_disk, num_parameters, profile
from tensormix.recover import recover
from tensormix.recover.rates import compressed_parameters
from tensormix.settings import Recover, Source
from tensormix.sites import blocks, cost_of, find_sites, macs_per_token
from tensormix.sites.installing import free_name, module_around, owners_closed_by, remove_owner
from tensormix.storage.bits import checkpoint_bits, stored_bits
from zoo import make, token_ids

IDS = token_ids(seed=5)
USERS = {"attention": attention(1), "across": across()}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(OPERATORS, "SharedBasis", SharedBasis)


@pytest.fixture(params=USERS)
def model(request):
    made = make("llama")
    share(made, USERS[request.param])
    attach(made)
    return made


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def owner_of(model):
    ((name, owner),) = ((n, part) for n, part in model.named_modules() if isinstance(part, SharedBasis))
    return name, owner


def test_it_stands_in_the_smallest_module_that_is_called_as_a_whole():
    for users, place in (
        (attention(1), "model.layers.1.self_attn"),
        (across(), "model"),
        (across(blocks=(0,)), "model.layers.0.mlp"),
    ):
        model = make("llama")
        share(model, users)
        share(model, attention(0), rank=2)
        found = [name for name, part in model.named_modules() if isinstance(part, SharedBasis)]
        assert f"{place}.basis" in found and len(found) == 2 and len(blocks(model)) == 4
    assert module_around(model, ["lm_head", "model.norm"]) == "" and free_name(model, "model") == "model_2"


def test_two_owners_of_one_place_get_two_names():
    model = make("llama")
    share(model, attention(1)[:2])
    share(model, attention(1)[2:])
    before, layer = logits(model), model.get_submodule("model.layers.1.self_attn.v_proj")
    assert layer.owner_name == "basis_2" and layer.owner is model.get_submodule("model.layers.1.self_attn.basis_2")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_saved_and_loaded_to_the_bit_without_a_complaint(tmp_path, model, options):
    model.save_pretrained(tmp_path, **options)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again), logits(model)) and cost_of(again) == cost_of(model)
    owner = owner_of(again)[1]
    views = [part for part in again.modules() if isinstance(part, View)]
    assert len(views) == len(owner.shapes) and all(view.owner is owner for view in views)
    assert checkpoint_bits(tmp_path) == stored_bits(model) == cost_of(model).bits
    again.save_pretrained(tmp_path / "again", **options)
    assert checkpoint_bits(tmp_path / "again") == checkpoint_bits(tmp_path)


def test_in_half_precision_and_with_quantised_cores(tmp_path, model):
    name, owner = owner_of(model)
    owner.basis = Quantized.of(owner.basis, bits=8)
    attach(model.half())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    # A buffer of positions that is not saved is float32 after loading, and float16 here.
    assert again.dtype == torch.float16 and torch.equal(logits(again.half()), logits(model))
    assert again.get_submodule(name).cost == owner.cost


def test_spread_over_devices_by_accelerate(tmp_path, model):
    """A part of the blocks lies on the disk, the owner in memory or with them."""
    model.save_pretrained(tmp_path)
    everything = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(4)}
    shared = {"model.basis": "disk"} if hasattr(model.model, "basis") else {}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={**everything, **spread, **shared}, offload_folder=tmp_path / "off"
    )
    torch.testing.assert_close(logits(again), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})), logits(model))


def test_a_copy_is_a_model_of_its_own(model):
    twin, wanted = copy.deepcopy(model), logits(model)
    with torch.no_grad():
        for parameter in owner_of(model)[1].parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), wanted) and not torch.equal(logits(model), wanted)


def test_everything_is_counted_once(tmp_path, model):
    owner = owner_of(model)[1]
    dense = make("llama")
    removed = sum(site.weight.numel() for site in find_sites(dense) if isinstance(model.get_submodule(site.name), View))
    assert num_parameters(model) == num_parameters(dense) - removed + owner.cost.parameters
    views = [part for part in model.modules() if isinstance(part, View)]
    assert macs_per_token(model) == macs_per_token(dense) - removed + sum(view.cost.macs for view in views)
    model.save_pretrained(tmp_path / "m")
    (row, *_) = profile({"m": model}, {"m": tmp_path / "m"}, tokens=(4,), repeats=1)
    assert (row["parameters"], row["macs_per_token"]) == (num_parameters(model), macs_per_token(model))
    assert 8 * row["bytes"]["float32"] == stored_bits(model) and row["bytes_on_disk"] == bytes_on_disk(model, None)


def test_a_step_of_training_moves_the_owner_once_with_the_gradients_of_all(tiny, tmp_path):
    model = load_model(str(tiny), dtype="float32")
    owner = share(model, across(blocks=(0, 1)))
    attach(model)
    trained = compressed_parameters(model)
    assert trained == set(owner.parameters())
    before = [parameter.detach().clone() for parameter in owner.parameters()]
    settings = Recover(
        text=(Source(exam=True),), steps=3, batch_size=2, window=24, learning_rate=1e-2, parameters="compressed"
    )
    recover(model, load_tokenizer(str(tiny)), settings, folder=tmp_path / "c", seed=0)
    assert all(not torch.equal(old, new) for old, new in zip(before, owner.parameters(), strict=True))


def test_the_dense_form_has_the_products_of_the_views(model):
    wanted = logits(model)
    dense = copy.deepcopy(model).dequantize()
    assert not any(isinstance(part, Operator) for part in dense.modules())
    torch.testing.assert_close(logits(dense), wanted, rtol=1e-4, atol=1e-5)


def test_an_owner_that_is_used_is_not_taken_out_and_one_that_is_missed_is_named(tmp_path, model):
    name, _ = owner_of(model)
    with pytest.raises(ValueError, match=name):
        remove_owner(model, name)
    parent, _, child = name.rpartition(".")
    delattr(model.get_submodule(parent), child)
    with pytest.raises(ValueError, match=r"_proj is a view of 'basis'"):
        model.save_pretrained(tmp_path)


def test_a_skeleton_has_it_on_meta(tmp_path, model):
    model.save_pretrained(tmp_path)
    bare = skeleton(tmp_path)
    assert cost_of(bare) == cost_of(model)
    assert {tensor.device.type for tensor in owner_of(bare)[1].state_dict().values()} == {"meta"}
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["operators"][owner_of(model)[0]]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_checkpoint_with_owners_is_compressed_further_block_by_block(tmp_path, model, calibrated):
    """What is shared is copied as it is, and multiplied through by the blocks on the way."""
    model.save_pretrained(tmp_path / "shared")
    plan = plan_of({"method": SvdLlm(keep=0.5) if calibrated else Svd(keep=0.5), "sites": ["down"]})
    batches = [token_ids(seed=1)]
    compress_checkpoint(tmp_path / "shared", tmp_path / "out", plan, batches)
    compress(model, plan, batches)
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(model)) and cost_of(again) == cost_of(model)


def test_an_owner_of_several_blocks_is_closed_by_the_last_of_them():
    model = make("llama")
    one, _ = share(model, across(blocks=(0, 2))), share(model, attention(1))
    assert [owners_closed_by(model, index) for index in range(4)] == [{}, {}, {"model.basis": one}, {}]
