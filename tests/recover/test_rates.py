"""`parameters: compressed` means all that took the place of dense weights, of whatever kind, wherever it is read."""

from __future__ import annotations

import pytest
import torch

from plans import plan_of
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.methods import SliceGpt, Streamline, Svd
from tensormix.models import load_model, load_tokenizer
from tensormix.recover import recover
from tensormix.recover.rates import compressed_parameters
from tensormix.settings import Recover, Source
from tensormix.sites import blocks
from zoo import make, token_ids

BATCHES = [token_ids(seed=1), token_ids(seed=2, length=7)]
LAST = plan_of({"method": Svd(keep=0.5), "blocks": "last 1"})


def streamlined(**kind):
    return plan_of({"method": Streamline(count=2, steps=2, **kind), "blocks": "0-1"})


def names_of_trained(model):
    trained = compressed_parameters(model)
    return {name for name, parameter in model.named_parameters() if parameter in trained}


def inside(model, module):
    return {name for name, parameter in model.named_parameters() if any(parameter is p for p in module.parameters())}


@pytest.mark.parametrize("kind", [{"replacement": "layer"}, {"replacement": "mlp", "width": 8}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_stands_for_several_blocks_is_trained_whole(family, kind):
    model = make(family)
    compress(model, streamlined(**kind), BATCHES)
    (first, second), expected = list(blocks(model))[:2], inside(model, blocks(model)[0])
    assert expected and names_of_trained(model) == expected and not list(second.parameters())
    assert first is not second


def test_a_fitted_block_is_known_again_from_memory_from_disk_and_after_a_stop(tmp_path):
    """Its parameters have the names of the model itself, so the checkpoint must say that it is one."""
    model = make("llama")
    model.save_pretrained(tmp_path / "dense")
    compress(model, streamlined(), BATCHES)
    expected = inside(model, blocks(model)[0])
    model.save_pretrained(tmp_path / "saved")

    def stop(done, _total, _name):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", streamlined(), BATCHES, stop)
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", streamlined(), BATCHES)
    compress_checkpoint(tmp_path / "out", tmp_path / "twice", LAST)
    assert names_of_trained(load_model(tmp_path / "saved")) == expected
    assert names_of_trained(load_model(tmp_path / "out")) == expected
    again = load_model(tmp_path / "twice")
    assert names_of_trained(again) == expected | inside(again, blocks(again)[-1]) - plain(again, blocks(again)[-1])
    again.save_pretrained(tmp_path / "thrice")
    assert names_of_trained(load_model(tmp_path / "thrice")) == names_of_trained(again)


def plain(model, block):
    """The norms of a block whose matrices are compressed."""
    return {name for name in inside(model, block) if "norm" in name}


def test_every_expert_of_a_compressed_stack_is_trained_and_none_of_a_dense_one():
    model = make("mixtral")
    compress(model, plan_of({"method": Svd(keep=0.5), "sites": ["down"], "blocks": "1"}))
    trained = names_of_trained(model)
    assert trained == {f"model.layers.1.mlp.experts.down.{factor}" for factor in ("left", "right")}
    assert all(model.get_parameter(name).shape[0] == 4 for name in trained)


def test_a_sliced_model_is_replaced_from_end_to_end():
    model = make("llama")
    compress(model, plan_of({"method": SliceGpt(keep_channels=0.75)}), BATCHES)
    assert names_of_trained(model) == {name for name, _ in model.named_parameters()}


def test_recovery_moves_the_fitted_block_and_nothing_else(tiny, tmp_path):
    model = load_model(str(tiny), dtype="float32")
    compress(model, streamlined(), BATCHES)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = Recover(
        text=(Source(exam=True),), steps=2, batch_size=2, window=24, learning_rate=1e-2, parameters="compressed"
    )
    recover(model, load_tokenizer(str(tiny)), settings, folder=tmp_path / "c", seed=0)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == inside(model, blocks(model)[0])
