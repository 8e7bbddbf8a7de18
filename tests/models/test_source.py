"""Where a model comes from: a folder, a folder of links, one file, an index, the Hub's cache; opened once."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import ModelSource, Sources, fingerprint, load_model, load_tokenizer, local_folder, skeleton
from tensormix.models import source as source_module
from tensormix.plan import Plan
from tensormix.storage.safetensors import INDEX
from zoo import logits, make

PLAN = Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.5}}])


@pytest.fixture
def dense(tmp_path):
    make("qwen2").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.fixture
def snapshot(dense, tmp_path):
    """As the Hub's cache has it: links with the names of the files, to files that are called by their hashes."""
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(dense.iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (folder / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:040x}")
    return folder


@pytest.fixture
def single(dense, tmp_path):
    """All weights in one file of another name, beside a second one that is of no concern."""
    folder = tmp_path / "single"
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: value for file in dense.glob("*.safetensors") for name, value in load_file(file).items()}
    save_file(tensors, folder / "weights.safetensors")
    save_file({"other": torch.ones(2)}, folder / "other.safetensors")
    return folder / "weights.safetensors"


def test_a_folder_of_links_is_read_as_the_files_behind_them(dense, snapshot, tmp_path):
    assert fingerprint(snapshot) == fingerprint(dense)
    assert torch.equal(logits(load_model(snapshot)), logits(load_model(dense)))
    for name, folder in (("a", dense), ("b", snapshot)):
        compress_checkpoint(folder, tmp_path / name, PLAN)
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert not any(file.is_symlink() for file in (tmp_path / "b").iterdir())


def test_one_file_beside_its_config(dense, single, tmp_path):
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load_model(single.parent)
    assert torch.equal(logits(load_model(str(single))), logits(load_model(dense)))
    compress_checkpoint(single, tmp_path / "out", PLAN)
    compress_checkpoint(dense, tmp_path / "expected", PLAN)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "expected")))
    assert (
        local_folder(single) == single.parent
        and ModelSource(single).entries.keys() == ModelSource(dense).entries.keys()
    )


def test_the_fingerprint_of_one_file_is_not_that_of_its_neighbours(single):
    before = fingerprint(single)
    save_file({"other": torch.zeros(2)}, single.parent / "other.safetensors")
    assert fingerprint(single) == before
    content = bytearray(single.read_bytes())
    content[-1] ^= 1
    single.write_bytes(content)
    assert fingerprint(single) != before


def test_an_index_stands_for_its_files(dense):
    shutil.copyfile(dense / INDEX, dense / "mine.safetensors.index.json")
    for file in (dense / INDEX, dense / "mine.safetensors.index.json"):
        assert ModelSource(file).entries == ModelSource(dense).entries
        assert torch.equal(logits(load_model(file)), logits(load_model(dense)))


def test_a_loaded_model_does_not_hang_on_its_file(single):
    model = load_model(single)
    before = logits(model)
    single.write_bytes(b"")
    assert torch.equal(logits(model), before)


def test_a_file_without_a_config(single):
    (single.parent / "config.json").unlink()
    with pytest.raises(ValueError, match=r"single holds weights.safetensors, but has no config.json"):
        ModelSource(single)


def test_a_source_that_is_open_serves_everything(tiny, tmp_path):
    source = ModelSource(tiny)
    assert ModelSource.of(source) is source
    assert source.config["model_type"] == "qwen3" and source.has_weights
    assert load_tokenizer(source).get_vocab() == load_tokenizer(tiny).get_vocab()
    assert source.tokenizer() is not source.tokenizer(), "it keeps how it was used last"
    assert skeleton(source).config.num_hidden_layers == 4
    assert torch.equal(load_model(source).lm_head.weight, load_model(tiny).lm_head.weight)
    compress_checkpoint(source, tmp_path / "out", PLAN)


def test_a_fingerprint_is_computed_once(tiny, monkeypatch):
    source, opened, Path_open = ModelSource(tiny), [], Path.open
    monkeypatch.setattr(Path, "open", lambda file, *args, **more: opened.append(file) or Path_open(file, *args, **more))
    first = source.fingerprint
    times = len(opened)
    assert times and source.fingerprint == first and fingerprint(source) == first and len(opened) == times
    assert not source.has_changed() and len(opened) > times, "to see a change, the files are read again"


def test_a_change_of_the_files_is_seen_when_asked_for(dense):
    source = ModelSource(dense)
    before = source.fingerprint
    file = sorted(dense.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert source.fingerprint == before and source.has_changed()


def test_sources_are_opened_once_each(tiny, dense):
    sources = Sources()
    assert sources[str(tiny)] is sources[str(tiny)] is not sources[str(dense)]
    with pytest.raises(ValueError, match="is neither a folder or file that exists"):
        sources["./nowhere"]


def test_a_hub_id_is_found_in_the_cache(dense, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(dense))
    source = ModelSource("owner/name")
    assert source.folder == dense and source.fingerprint == "hub:owner/name"
    assert source.local.fingerprint == fingerprint(dense) and source.local is source.local
    assert source.entries == ModelSource(dense).entries and source.config["model_type"] == "qwen2"


def test_a_large_file_is_sampled(dense, monkeypatch):
    whole = fingerprint(dense)
    monkeypatch.setattr(source_module, "_SAMPLE", 8)
    assert fingerprint(dense) != whole
