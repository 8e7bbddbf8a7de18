"""Where a compressed checkpoint is written: no room, a folder that is there, a source that changes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from streamed import BATCHES, PLANS, hashes, leftovers, save_dense
from tensormix.compression import to_files as disk
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.storage.journal import Journal


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_dense(tmp_path / "dense")


@pytest.mark.parametrize(
    ("owner", "writer", "good"),
    [
        (disk, "write_shard", 2),
        (Journal, "append", 1),
        (os, "posix_fallocate", 3),
        (disk, "write_json", 0),
        (disk.shutil, "copyfileobj", 0),
    ],
    ids=["a block", "the journal", "activations", "the index", "a file beside"],
)
def test_a_full_disk(tmp_path, folder, monkeypatch, owner, writer, good):
    """Whatever is being written then; what stands there already is kept."""
    plan, real, calls = PLANS["calibrated"], getattr(owner, writer), []
    compress_checkpoint(folder, tmp_path / "straight", plan, BATCHES)

    def full(*args):
        calls.append(args)
        if len(calls) > good:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(owner, writer, full)
    with pytest.raises(
        ValueError, match=r"the disk under .* is full; make room and .* after the \d files that are fini"
    ):
        compress_checkpoint(folder, tmp_path / "out", plan, BATCHES, spill=True)
    assert len(calls) == good + 1 and not (tmp_path / "out").exists()
    monkeypatch.undo()
    compress_checkpoint(folder, tmp_path / "out", plan, BATCHES, spill=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")
    assert leftovers(tmp_path) == ["dense", "out", "out.journal.jsonl", "straight", "straight.journal.jsonl"]


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000})())
    with pytest.raises(ValueError, match=r"has 0.00 GB free, and 0.00 GB are needed; nothing was written"):
        compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"])
    assert leftovers(tmp_path) == ["dense"]


def test_the_space_asked_for_is_what_is_written(tmp_path, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(disk, "check_space", lambda path, needed: asked.append(needed))
    for name, plan in PLANS.items():
        compress_checkpoint(folder, tmp_path / name, plan, BATCHES)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        beside = (folder / "generation_config.json").stat().st_size
        written = index["metadata"]["total_size"] + beside
        assert asked[-1] == written
        compress_checkpoint(folder, tmp_path / "again", plan, BATCHES, spill=True, overwrite=True)
        streams = {"weights_only": 0, "calibrated": 1, "both_streams": 2}[name]
        assert asked[-1] == written + streams * 4 * 32 * sum(batch.numel() for batch in BATCHES)


def test_an_output_folder_that_is_there_already(tmp_path, folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out exists already; choose another folder, or say that it may be overwrit"):
        compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"], overwrite=True)
    assert not (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize("out", [".", "dense"])
def test_the_source_is_never_overwritten(tmp_path, folder, out):
    before = hashes(folder)
    with pytest.raises(
        ValueError, match=r"holds the model that is to be compressed \(.*dense\); choose another folder"
    ):
        compress_checkpoint(folder, tmp_path / out, PLANS["weights_only"], overwrite=True)
    assert hashes(folder) == before


def test_two_at_once(tmp_path, folder):
    def second(*_) -> None:
        with pytest.raises(ValueError, match=r"out is being written by another process; wait"):
            compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"])

    compress_checkpoint(folder, tmp_path / "straight", PLANS["weights_only"])
    compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"], progress=second)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


def test_a_source_that_changes_on_the_way(tmp_path, folder):
    def change(done: int, *_) -> None:
        if done == 1:
            (folder / "config.json").write_text((folder / "config.json").read_text() + " ")

    with pytest.raises(ValueError, match=r"dense changed while it was read: .* start again"):
        compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"], progress=change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"inputs": "dens"}, "inputs must be 'propagated' or 'dense', got 'dens'"),
        ({"dtype": "bf16"}, "dtype must be one of auto, float32, .* got 'bf16'"),
        ({"plan": PLANS["calibrated"]}, "mean_output needs calibration batches .* but none were given"),
    ],
)
def test_a_wrong_request_leaves_nothing_behind(tmp_path, folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compress_checkpoint(folder, tmp_path / "out", **{"plan": PLANS["weights_only"], **options})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; the compressed checkpoint is a folder"):
        compress_checkpoint(folder, tmp_path / "file", PLANS["weights_only"], overwrite=True)
    assert leftovers(tmp_path) == ["dense", "file"]
