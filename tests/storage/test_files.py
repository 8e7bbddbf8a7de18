"""Whole or absent."""

import json
import os

import pytest

from tensormix.storage.files import environment, read_json, whole_folder, write_json, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(target, {"new": 2})
    assert json.loads(target.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "model"
    with whole_folder(target) as part:
        (part / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(RuntimeError), whole_folder(target) as part:
        (part / "a").write_text("2")
        raise RuntimeError("killed")
    assert (target / "a").read_text() == "1"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_an_interrupted_write_left_behind_is_replaced(tmp_path):
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "half").write_text("x")
    with whole_folder(tmp_path / "model") as part:
        (part / "a").write_text("1")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["a"]


def test_a_broken_json_file_is_named(tmp_path):
    write_text(tmp_path / "a.json", "{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON .*; delete it to have it made again"):
        read_json(tmp_path / "a.json")


def test_the_environment_names_versions_commit_and_hardware():
    facts = environment()
    assert facts["versions"]["torch"] and "tensormix" in facts["versions"]
    assert facts["hardware"]["cores"] >= 1
    assert set(facts) == {"versions", "commit", "hardware", "system"}
