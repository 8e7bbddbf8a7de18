"""The page of a run, the comparison of runs, and the sentences for wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_folders import write_run, write_sweep
from report_page import csv_rows, download, page_of

from tensormix.report import build_report
from tensormix.report.costs import MOST_POINTS, thinned
from tensormix.report.numbers import bytes_text, change, count, percent, short, speed
from tensormix.report.svg import Scale, log_ticks, nice_ticks


def test_run_page_has_the_dense_reference_beside_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run5")
    write_run(folder / "dense", depth=0)
    page = page_of(folder)
    assert re.fullmatch(
        r"example-45m with 5 blocks replaced: 69\.\d % exam accuracy, against 7\d\.\d % dense", page.all("h1")[0].text()
    )
    lines = [row.text() for row in page.id("measures").all("tr")]
    assert [line for line in lines if line.startswith("Exam accuracy") and "points" in line]
    assert len(page.id("sites").all("tbody")[0].all("tr")) == 5 * 7
    assert json.loads(download(page.id("settings"), "recipe.yaml")) == json.loads((folder / "recipe.json").read_text())
    assert "tensormix run recipe.yaml" in page.id("reproduce").text()
    assert "capitals" in page.id("measures").text()
    assert len(csv_rows(page.id("matching"), "matching.csv")) == 35


def test_unfinished_run_says_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", only=("compress",)))
    assert "not finished" in page.all("h1")[0].text()
    assert "There is no evaluate.json" in page.all("p", "banner")[0].text()
    assert "recover.json, evaluate.json, diagnose.json, profile.json" in page.id("notes").text()


def test_run_without_any_stage(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", only=()))
    assert "with 0 blocks replaced: not finished" in page.all("h1")[0].text()


def test_comparison_has_one_row_for_each_run(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a" / "run", depth=3), write_run(tmp_path / "b" / "run", depth=6)]
    folders += [write_run(tmp_path / "null", "zero", depth=3), write_run(tmp_path / "half", only=("compress",))]
    page = page_of(*folders)
    rows = csv_rows(page.id("runs"), "runs.csv")
    assert [row["run"] for row in rows] == ["a/run", "b/run", "null", "half"]
    assert rows[3]["accuracy"] == ""
    assert float(rows[0]["parameters"]) > float(rows[1]["parameters"])
    assert "Not finished (no evaluate.json): half." in page.id("notes").text()
    assert len(csv_rows(page.id("size"), "size.csv")) == 3


def test_default_place_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert build_report([one]) == one / "report.html"
    monkeypatch.chdir(tmp_path)
    assert build_report([one, two]).resolve() == tmp_path / "report.html"


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run")
    build_report([folder]).write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tensormix.report.page.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build_report([folder])
    assert (folder / "report.html").read_text() == "old"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_no_folder() -> None:
    with pytest.raises(ValueError, match="no folder was given; give one sweep folder, or one or more run folders"):
        build_report([])


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        build_report([tmp_path / "nowhere"])


def test_folder_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"neither sweep\.json nor recipe\.json nor a stage file \(reparameterise\.json"
    ):
        build_report([tmp_path])
    write_run(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"its subfolder mine is one, did you mean .*mine\?"):
        build_report([tmp_path])


def test_file_instead_of_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"recipe\.json is a file; give the run or sweep folder, for example .*run"):
        build_report([folder / "recipe.json"])


def test_a_path_instead_of_a_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a list of folders, got one path"):
        build_report(str(tmp_path))  # type: ignore[arg-type]


def test_out_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; give a file, for example .*report\.html"):
        build_report([write_run(tmp_path / "run")], tmp_path)


def test_a_sweep_among_runs(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", depths=(1,), nulls=False, first=False)
    with pytest.raises(ValueError, match="sweep is a sweep, and only runs can be compared; report each sweep alone"):
        build_report([sweep, write_run(tmp_path / "run")])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"rows": [', r"evaluate\.json is not valid JSON \(line 1, column \d+.*run its stage again"),
        ("[]", r"evaluate\.json must hold a JSON object, it holds a list"),
        ('{"rows": 3}', r"evaluate\.json must hold 'rows', a list of objects"),
    ],
)
def test_broken_stage_file_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluate.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        build_report([folder])


def test_stage_file_that_is_no_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluate.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"evaluate\.json is not UTF-8 text"):
        build_report([folder])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, r"sweep\.json must hold 'cells', a list of objects"),
        ({"cells": [{"cell": "a", "folder": "a"}]}, r"a cell lacks depth, direction, method"),
    ],
)
def test_broken_sweep_file_is_named(tmp_path: Path, content: dict, sentence: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        build_report([tmp_path])


def test_long_loss_curves_are_averaged_without_losing_a_step() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    curve = thinned(rows)
    assert len(curve) <= MOST_POINTS
    assert sum(num for *_, num in curve) == 1000
    assert sum(loss * num for _, loss, num in curve) == pytest.approx(sum(range(1, 1001)))
    assert thinned(rows[:5]) == [(step, float(step), 1) for step in range(1, 6)]


def test_numbers_for_people() -> None:
    assert count(6_738_415_616) == "6.738\u00a0B" and count(999_600) == "999.6\u00a0k" and count(12) == "12"
    assert bytes_text(6.674 * 1024**3) == "6.674\u00a0GiB"
    assert change(53.18, 100) == "\u221246.8\u00a0%" and change(100.01, 100) == "±0\u00a0%" and change(1, 0) == "–"
    assert speed(0.5) == "0.50× (slower)" and speed(2) == "2.00× (faster)" and speed(1.0) == "equally fast (1.00×)"
    assert percent(None) == "–" and short(0.00012) == "0.00012" and short(123456) == "123456"


def test_scales_and_ticks() -> None:
    assert nice_ticks(0, 11) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(10, 1000) == [10, 20, 50, 100, 200, 500, 1000]
    scale = Scale(1, 100, 0, 200, log=True)
    assert scale(10) == pytest.approx(100)
    for low, high in ((0.0, 1e-6), (0.42, 0.4200001), (1e6, 5e9), (-3.0, 2.0)):
        ticks = nice_ticks(low, high)
        assert ticks and all(low <= tick <= high for tick in ticks) and len(ticks) <= 7
