"""What people keep a model in, and what is no model: each is read, or refused in one sentence everywhere."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import ModelSource, load_model, load_tokenizer, skeleton
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.run.check import check
from zoo import logits, make

PLAN = Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.5}}])
OPENED = {
    "compress_checkpoint": lambda folder: compress_checkpoint(folder, folder.parent / "out", PLAN),
    "load_model": load_model,
    "skeleton": skeleton,
    "load_tokenizer": load_tokenizer,
    "check": lambda folder: check(Recipe.model_validate({"model": str(folder), "plan": PLAN.model_dump()})),
}


@pytest.fixture
def dense(tmp_path):
    make("qwen3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def add_adapter(folder, **files):
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 4)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("opened", OPENED)
def test_an_adapter_beside_a_model_is_refused_wherever_it_is_opened(opened, dense):
    add_adapter(dense)
    with pytest.raises(
        ValueError, match=r"model holds an adapter of some/base beside the model .*merge it first.* or t"
    ):
        OPENED[opened](dense)
    assert not (dense.parent / "out").exists()
    (dense / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"beside the model \(adapter_model.safetensors\)"):
        OPENED[opened](dense)


def test_an_adapter_alone_is_no_model(tmp_path):
    add_adapter(tmp_path)
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match=r"holds an adapter of some/base \(adapter_config.json\), not a model"):
            ModelSource(place)


def test_weights_that_were_saved_with_an_adapter_around_them(dense):
    file = dense / "model.safetensors"
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(wrapped, file, {"format": "pt"})
    for opened in ("compress_checkpoint", "load_model"):
        with pytest.raises(ValueError, match=r"base_model.model.*saved with an adapter around them; merge it first"):
            OPENED[opened](dense)


def test_a_folder_with_a_config_alone_is_enough_to_count(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    found, expected = OPENED["check"](tmp_path / "bare"), OPENED["check"](dense)
    assert found["compressed"] == expected["compressed"] and skeleton(tmp_path / "bare").dtype == torch.float32
    assert found["notes"] == ["config.json says no dtype, and there are no weights to ask: float32 is assumed"]
    assert "notes" not in expected


def hub(dense, root):
    """The cache of a repository: two revisions, of which refs/main is the second; the files are links."""
    folder = root / "models--owner--name"
    for revision in ("aaa", "bbb"):
        (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    for number, file in enumerate(sorted(dense.iterdir())):
        shutil.copy(file, folder / "blobs" / str(number))
        (folder / "snapshots" / "bbb" / file.name).symlink_to(f"../../blobs/{number}")
    return folder


def test_a_cache_of_the_hub_is_read_through_its_links(dense, tmp_path):
    folder, expected = hub(dense, tmp_path / "hub"), logits(load_model(dense))
    snapshot = folder / "snapshots" / "bbb"
    with pytest.raises(ValueError, match=r"is a cache of the Hub with aaa, bbb in it; name the one that is meant"):
        ModelSource(folder)
    (folder / "refs" / "main").write_text("bbb")
    for place in (folder, snapshot, snapshot / "model.safetensors"):
        assert torch.equal(logits(load_model(place)), expected)
    compress_checkpoint(folder, tmp_path / "out", PLAN)
    compress_checkpoint(dense, tmp_path / "expected", PLAN)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "expected")))
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_a_vocabulary_that_was_resized_without_its_config(dense):
    file = dense / "model.safetensors"
    tensors = load_file(file)
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        tensors[name] = torch.cat([tensors[name], torch.zeros(3, tensors[name].shape[1])])
    save_file(tensors, file, {"format": "pt"})
    for opened in ("compress_checkpoint", "load_model"):
        sentence = r"model.embed_tokens.weight has the shape \(64, 32\), but config.json implies \(61, 32\).*vocab_size"
        with pytest.raises(ValueError, match=sentence):
            OPENED[opened](dense)


def test_tensors_that_the_model_does_not_know_are_carried_on_and_said(dense, tmp_path):
    file = dense / "model.safetensors"
    save_file({**load_file(file), "value_head.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    (note,) = OPENED["check"](dense)["notes"]
    assert "1 tensors that a Qwen3ForCausalLM does not know" in note and "value_head.weight" in note
    load_model(dense)
    compress_checkpoint(dense, tmp_path / "out", PLAN)
    entries = ModelSource(tmp_path / "out").entries
    assert torch.equal(entries["value_head.weight"].read(), torch.ones(2, 2))


def test_windows_that_are_longer_than_the_model_has_positions_are_said(dense):
    limit = skeleton(dense).config.max_position_embeddings
    text = {"text": {"facts": True}, "window": limit + 1, "stride": 8}
    data = {"model": str(dense), "plan": PLAN.model_dump(), "evaluate": {"exam": None, "perplexity": [text]}}
    data["calibration"] = {"text": {"facts": True}, "window": limit}
    (note,) = check(Recipe.model_validate(data))["notes"]
    assert f"evaluate.perplexity[0] reads windows of {limit + 1} tokens, and the model was made for {limit}" in note


def test_a_tied_head_that_is_stored_twice(dense, tmp_path):
    file, expected = dense / "model.safetensors", logits(load_model(dense))
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert torch.equal(logits(load_model(dense)), expected)
    compress_checkpoint(dense, tmp_path / "out", PLAN)
    shutil.copytree(dense, tmp_path / "once")
    save_file(tensors, tmp_path / "once" / "model.safetensors", {"format": "pt"})
    compress_checkpoint(tmp_path / "once", tmp_path / "expected", PLAN)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "expected")))
