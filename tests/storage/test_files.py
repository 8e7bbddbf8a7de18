"""Whole or absent."""

import json
import os

import pytest

from tensormix.storage.files import (
    content_digest,
    environment,
    new_file,
    read_json,
    remove_unfinished,
    unfinished,
    whole_folder,
    write_json,
    write_text,
)


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


def test_two_writers_of_one_name_never_share_what_is_unfinished(tmp_path):
    with whole_folder(tmp_path / "model") as slow:
        (slow / "a").write_text("slow")
        with whole_folder(tmp_path / "model") as fast, new_file(tmp_path / "b") as one, new_file(tmp_path / "b") as two:
            (fast / "a").write_text("fast")
            one.write(b"1")
            two.write(b"2")
        assert (tmp_path / "model" / "a").read_text() == "fast"
    assert (tmp_path / "model" / "a").read_text() == "slow"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "model"]


def test_what_killed_processes_left_behind_is_removed_and_nothing_else(tmp_path):
    left = [unfinished(tmp_path / "model"), unfinished(tmp_path / "a.json")]
    left[0].mkdir()
    (left[0] / "half").write_text("x")
    left[1].write_text("x")
    kept = ["model", ".lock", ".model.part", "my.unfinished"]
    for name in kept:
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path, "a.json")
    assert {file.name for file in tmp_path.iterdir()} == {*kept, left[0].name}
    remove_unfinished(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(kept)


def test_a_new_name_is_on_the_disk_before_anything_goes_on(tmp_path, monkeypatch):
    """A rename is lost with the power unless its folder was synced after it."""
    synced = []

    def sync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), sorted(os.listdir(tmp_path))))

    monkeypatch.setattr(os, "fsync", sync)
    write_json(tmp_path / "a.json", {})
    assert synced[-1] == (str(tmp_path), ["a.json"])
    with whole_folder(tmp_path / "model") as part:
        (part / "b").write_text("1")
    assert synced[-1] == (str(tmp_path), ["a.json", "model"])
    assert {str(part), str(part / "b")} <= {name for name, _ in synced}  # the file, and its name


def test_the_digest_of_a_file_follows_its_content(tmp_path):
    file = tmp_path / "a.txt"
    assert content_digest(file) is None
    of_folder = content_digest(tmp_path)
    file.write_text("one")
    assert content_digest(tmp_path) != of_folder  # of all files of a folder
    before = content_digest(file)
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    after = content_digest(file)
    assert before != after
    file.write_text("one")
    os.utime(file, ns=(2, 2))
    assert content_digest(file) == before


def test_a_broken_json_file_is_named(tmp_path):
    write_text(tmp_path / "a.json", "{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON .*; delete it to have it made again"):
        read_json(tmp_path / "a.json")


def test_the_environment_names_versions_commit_and_hardware():
    facts = environment()
    assert facts["versions"]["torch"] and "tensormix" in facts["versions"]
    assert facts["hardware"]["cores"] >= 1
    assert set(facts) == {"versions", "commit", "hardware", "system"}
