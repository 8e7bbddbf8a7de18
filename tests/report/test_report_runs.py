"""The page of a run, the comparison of runs, and the sentences for wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from real_pages import change, copied, model_of, rows_of
from report_page import csv_rows, download, page_of

from tensormix.report import build_report
from tensormix.report.costs import MOST_POINTS, thinned
from tensormix.report.numbers import bytes_text, count, percent, short, speed
from tensormix.report.numbers import change as changed
from tensormix.rows import STAGES


@pytest.fixture
def run(real_run: Path, tmp_path: Path) -> Path:
    return copied(real_run, tmp_path, at="mine")


def only(folder: Path, *stages: str) -> Path:
    """Leave no other stage."""
    for stage in set(STAGES) - set(stages):
        (folder / f"{stage}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "dense", ignore_errors=True)
    return folder


def test_run_page_has_the_dense_reference_beside_it(run: Path) -> None:
    page = page_of(run)
    found = [next(row for row in rows_of(folder, "evaluate", "accuracy") if row["subject"] == "all")
             for folder in (run, run / "dense")]  # fmt: skip
    own, dense = (f"{100 * row['value']:.1f} %" for row in found)
    headline = f"{model_of(run)} with 2 blocks replaced: {own} exam accuracy, against {dense} dense"
    assert page.all("h1")[0].text() == headline
    lines = [row.text() for row in page.id("measures").all("tr")]
    assert [line for line in lines if line.startswith("Exam accuracy") and "points" in line]
    sites = rows_of(run, "compress")
    assert len(page.id("sites").all("tbody")[0].all("tr")) == len(sites)
    assert json.loads(download(page.id("settings"), "recipe.yaml")) == json.loads((run / "recipe.json").read_text())
    assert "tensormix run recipe.yaml" in page.id("reproduce").text()
    assert {row["subject"] for row in rows_of(run, "evaluate", "accuracy") if row["task"] == "exam"} - {"all"} <= {
        row.all("th")[0].text() for row in page.id("measures").all("tr") if row.all("th")
    }
    assert [float(row["relative_error"]) for row in csv_rows(page.id("matching"), "matching.csv")] == pytest.approx(
        [row["relative_error"] for row in sorted(sites, key=lambda row: (row["block"], row["role"]))]
    )


def test_unfinished_run_says_so(run: Path) -> None:
    page = page_of(only(run, "compress"))
    assert "not finished" in page.all("h1")[0].text()
    assert "There is no evaluate.json" in page.all("p", "banner")[0].text()
    assert "recover.json, evaluate.json, diagnose.json, profile.json" in page.id("notes").text()


def test_run_without_any_stage(run: Path) -> None:
    assert "with 0 blocks replaced: not finished" in page_of(only(run)).all("h1")[0].text()


def test_comparison_has_one_row_for_each_run(real_sweep: Path, tmp_path: Path) -> None:
    folders = [copied(real_sweep / "last-01-mixt2", tmp_path / "a", at="run")]
    folders += [copied(real_sweep / "last-03-mixt2", tmp_path / "b", at="run")]
    folders += [only(copied(real_sweep / "last-02-mixt2", tmp_path, at="half"), "compress")]
    page = page_of(*folders)
    rows = csv_rows(page.id("runs"), "runs.csv")
    assert [row["run"] for row in rows] == ["a/run", "b/run", "half"]
    assert [row["blocks_replaced"] for row in rows] == ["1", "3", "2"]
    assert rows[2]["accuracy"] == ""
    assert float(rows[0]["parameters"]) > float(rows[1]["parameters"])
    assert "Not finished (no evaluate.json): half." in page.id("notes").text()
    assert {row["series"] for row in csv_rows(page.id("size"), "size.csv")} >= {"a/run", "b/run"}
    assert {"tradeoff", "residual", "operators"} <= {figure.attrs["id"] for figure in page.all("figure")}


def test_default_place_of_the_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_report([run]) == run / "report.html"
    monkeypatch.chdir(tmp_path)
    assert build_report([run, run / "dense"]).resolve() == tmp_path / "report.html"


def test_a_page_that_cannot_be_written_leaves_nothing_behind(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_report([run]).write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tensormix.report.page.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build_report([run])
    assert (run / "report.html").read_text() == "old"
    assert not [path for path in run.iterdir() if path.name.startswith(".report")]


def test_wrong_folders_are_named_with_what_is_right(run: Path, real_sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder was given"):
        build_report([])
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        build_report([tmp_path / "nowhere"])
    with pytest.raises(
        ValueError, match=r"no sweep\.json.*allocate\.json.*its subfolder mine is one, did you mean .*mine\?"
    ):
        build_report([tmp_path])
    with pytest.raises(ValueError, match=r"recipe\.json is a file; .* for example .*mine"):
        build_report([run / "recipe.json"])
    with pytest.raises(ValueError, match="must be a list of folders, got one path"):
        build_report(str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is a folder; give a file, for example .*report\.html"):
        build_report([run], tmp_path)
    with pytest.raises(ValueError, match=r"is a sweep, .* report each sweep alone"):
        build_report([real_sweep, run])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"rows": [', r"evaluate\.json is not valid JSON \(line 1, column \d+.*run its stage again"),
        (b"[]", r"evaluate\.json must hold a JSON object, it holds a list"),
        (b'{"rows": 3}', r"evaluate\.json must hold 'rows', a list of objects"),
        (b"\xff\xfe\x00", r"evaluate\.json is not UTF-8 text"),
    ],
)
def test_broken_stage_file_is_named(run: Path, content: bytes, sentence: str) -> None:
    (run / "evaluate.json").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        build_report([run])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, r"sweep\.json must hold 'cells', a list of objects"),
        ({"cells": [{"cell": "a", "folder": "a"}]}, r"lacks depth, direction, method"),
    ],
)
def test_broken_sweep_file_is_named(tmp_path: Path, content: dict[str, Any], sentence: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        build_report([tmp_path])


def test_rows_of_another_version_are_named(run: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for row in content["rows"]:
            row["perplexity_" if row["kind"] == "perplexity" else "other"] = row.pop("value", None)

    change(run / "evaluate.json", rename)
    with pytest.raises(ValueError, match=r"has no 'value'.*another version.*run its stage again"):
        build_report([run])


def test_long_loss_curves_are_averaged_without_losing_a_step() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    curve = thinned(rows)  # type: ignore[arg-type]
    assert len(curve) <= MOST_POINTS
    assert sum(num for *_, num in curve) == 1000
    assert sum(loss * num for _, loss, num in curve) == pytest.approx(sum(range(1, 1001)))
    assert thinned(rows[:5]) == [(step, float(step), 1) for step in range(1, 6)]  # type: ignore[arg-type]


def test_numbers_for_people() -> None:
    assert count(6_738_415_616) == "6.738\u00a0B" and count(999_600) == "999.6\u00a0k" and count(12) == "12"
    assert bytes_text(6.674 * 1024**3) == "6.674\u00a0GiB"
    assert changed(53.18, 100) == "\u221246.8\u00a0%" and changed(100.01, 100) == "±0\u00a0%" and changed(1, 0) == "–"
    assert speed(0.5) == "0.50× (slower)" and speed(2) == "2.00× (faster)" and speed(1.0) == "equally fast (1.00×)"
    assert percent(None) == "–" and short(0.00012) == "0.00012" and short(123456) == "123456"
