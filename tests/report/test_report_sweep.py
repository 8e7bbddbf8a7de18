"""The page of a sweep holds every measured value, and says what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_folders import NUM_BLOCKS, write_run, write_sweep
from report_page import Element, csv_rows, download, marks, page_of

from tensormix.report import build_report
from tensormix.report.heat import column_place
from tensormix.report.svg import LEFT, RIGHT, WIDTH

FIGURES = ("accuracy", "drift-map", "drift-means", "perplexity", "size", "recovery", "matching")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("report") / "sweep-one")


@pytest.fixture(scope="module")
def page(sweep: Path) -> Element:
    return page_of(sweep)


def rows_of(folder: Path, stage: str, kind: str) -> list[dict]:
    return [row for row in json.loads((folder / f"{stage}.json").read_text())["rows"] if row["kind"] == kind]


def cells(sweep: Path, **asked: object) -> list[dict]:
    found = json.loads((sweep / "sweep.json").read_text())["cells"]
    return [cell for cell in found if cell["depth"] and all(cell[key] == value for key, value in asked.items())]


def test_page_is_self_contained(sweep: Path) -> None:
    html = build_report([sweep]).read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    assert "default-src 'none'" in html
    assert len(html) < 2_000_000


def test_every_link_inside_the_page_has_its_target_and_every_id_is_there_once(page: Element) -> None:
    ids = [item.attrs["id"] for item in page.all() if "id" in item.attrs]
    assert len(ids) == len(set(ids))
    targets = {item.attrs["href"][1:] for item in page.all("a") if item.attrs["href"].startswith("#")}
    assert targets <= set(ids)


def test_headline_answers_in_one_sentence(page: Element) -> None:
    assert page.all("h1")[0].text() == (
        f"6 of {NUM_BLOCKS} blocks of example-45m can be replaced before exam accuracy leaves its plateau"
    )
    lead = page.all("p", "lead")[0].text()
    assert "the boundary is at NB = 7 (95 % interval 7 to 8)" in lead
    assert "Saved at NB = 6: −37.5 % parameters, −20.5 % MACs per token, −37.5 % bytes on disk" in lead
    assert re.search(r"0\.\d\d× \(slower\) at 1 token, 1\.\d\d× \(faster\) at 128 tokens", lead)
    assert "the plateau ends at 5 for zeroed linears and at 4 for dropped blocks" in lead
    assert "does not outlast" not in lead


def test_headline_says_if_a_null_baseline_comes_as_far(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", depths=(1, 5, 7))
    content = json.loads((folder / "sweep.json").read_text())
    next(row for row in content["boundary"] if row["method"] == "zero")["value"] = 7
    (folder / "sweep.json").write_text(json.dumps(content))
    assert "MixT does not outlast zeroed linears in this sweep." in page_of(folder).all("p", "lead")[0].text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"value": None, "low": None, "high": None, "last_good": 11},
            "does not leave its plateau up to 11 of 12 blocks",
        ),
        ({"value": 1, "low": 1, "high": 1, "last_good": 0}, "No block of example-45m can be replaced"),
        ({"value": 9, "low": 8, "high": None, "last_good": 5}, "5 of 12 blocks of example-45m can be replaced"),
    ],
)
def test_headline_of_other_boundaries(tmp_path: Path, change: dict, sentence: str) -> None:
    folder = write_sweep(tmp_path / "sweep", depths=(1, 5, 9, 11), nulls=False, first=False)
    content = json.loads((folder / "sweep.json").read_text())
    content["boundary"][0] |= change
    (folder / "sweep.json").write_text(json.dumps(content))
    page = page_of(folder)
    assert sentence in page.all("h1")[0].text()
    if change["value"] == 9:
        assert "interval 8 or later" in page.all("p", "lead")[0].text()
        assert "Depths 6 to 8 were not scanned" in page.all("p", "lead")[0].text()


@pytest.mark.parametrize("name", FIGURES)
def test_figure_table_and_csv_hold_the_same_rows(page: Element, name: str) -> None:
    figure = page.id(name)
    written = csv_rows(figure, f"{name}.csv")
    assert written
    table = figure.all("table", "data")[0]
    assert len(table.all("tbody")[0].all("tr")) == len(written)
    assert [head.text() for head in table.all("th")] == list(written[0])
    assert all(svg.attrs["aria-label"] and svg.attrs["role"] == "img" for svg in figure.all("svg", "panel"))


def test_accuracy_points_are_the_measured_ones(sweep: Path, page: Element) -> None:
    figure = page.id("accuracy")
    written = csv_rows(figure, "accuracy.csv")
    assert len(written) == len(cells(sweep)) + 1
    for row in written:
        asked = {"method": row["method"], "direction": row["direction"], "depth": int(row["N_B"])}
        folder = sweep / (cells(sweep, **asked)[0]["folder"] if row["method"] != "dense" else "dense")
        truth = next(item for item in rows_of(folder, "evaluate", "accuracy") if item["subject"] == "all")
        for column, key in (
            ("accuracy", "value"),
            ("low", "low"),
            ("high", "high"),
            ("num_questions", "num_questions"),
        ):
            assert float(row[column]) == truth[key]
        assert float(row["OE"]) == rows_of(folder, "diagnose", "output_entropy")[0]["value"]
        assert float(row["PE"]) == rows_of(folder, "diagnose", "prediction_entropy")[0]["value"]
    panels = figure.all("svg", "panel")
    back = [row for row in written if row["direction"] == "last"]
    both = [row for row in written if row["method"] in ("mixt", "dense")]
    for panel, expected, column in zip(
        panels, (back, both, back, back), ("accuracy", "accuracy", "OE", "PE"), strict=True
    ):
        drawn = sorted((float(mark.attrs["data-x"]), float(mark.attrs["data-y"])) for mark in panel.all(cls="mark"))
        truth = sorted((float(row["N_B"]), float(row[column])) for row in expected)
        assert drawn == [pytest.approx(pair, rel=1e-8) for pair in truth]
    assert len(panels[0].all(cls="bar")) == len(back)


def test_boundary_is_drawn_where_it_is(page: Element) -> None:
    panel = page.id("accuracy").all("svg", "panel")[0]
    line = panel.all("path", "boundary")[0]
    assert float(line.attrs["data-x"]) == 7
    most = 11.0
    span = WIDTH - RIGHT - LEFT
    expected = LEFT + (7 + 0.03 * most) / (1.06 * most) * span
    assert float(re.match(r"M([\d.]+),", line.attrs["d"])[1]) == pytest.approx(expected, abs=0.01)  # type: ignore[index]
    mark = next(mark for mark in panel.all(cls="mark") if mark.attrs["data-x"] == "7")
    assert float(re.search(r"\(([\d.]+),", mark.attrs["transform"])[1]) == pytest.approx(expected, abs=0.01)  # type: ignore[index]
    band = panel.all("rect", "interval")[0]
    assert (band.attrs["data-low"], band.attrs["data-high"]) == ("7", "8")
    assert float(band.attrs["x"]) == pytest.approx(expected, abs=0.01)
    assert float(band.attrs["width"]) == pytest.approx(span / (1.06 * most), abs=0.02)


def test_drift_map_has_one_square_for_each_value_and_the_boundary_on_its_column(sweep: Path, page: Element) -> None:
    figure = page.id("drift-map")
    squares = figure.all("rect", "heat")
    assert len(squares) == len(csv_rows(figure, "drift-map.csv")) == 11 * NUM_BLOCKS
    truth = rows_of(sweep / "mixt-last-3", "diagnose", "drift_profile")[4]
    square = next(s for s in squares if s.attrs["data-x"] == "3" and s.attrs["data-y"] == "4")
    assert float(square.attrs["data-value"]) == pytest.approx(truth["value"], rel=1e-5)
    column = next(s for s in squares if s.attrs["data-x"] == "7")
    at = float(re.match(r"M([\d.]+),", figure.all("path", "boundary")[0].attrs["d"])[1])  # type: ignore[index]
    middle = float(column.attrs["x"]) + (float(column.attrs["width"]) - 0.3) / 2
    assert at == pytest.approx(middle, abs=0.05)


def test_a_boundary_between_scanned_depths_lies_between_their_columns() -> None:
    assert column_place([1, 3, 7], 3) == 1.5
    assert column_place([1, 3, 7], 5) == 2.0


def test_drift_summaries_carry_the_fit(page: Element) -> None:
    figure = page.id("drift-means")
    assert len(marks(figure)) == len(csv_rows(figure, "drift-means.csv")) == 2 * 11
    assert len(figure.all("path", "fit")) == 1
    assert (
        "grows by 0.008 per block up to NB = 7.2 and by 0.04 per block after it" in figure.all("figcaption")[0].text()
    )


def test_other_figures_draw_every_row(sweep: Path, page: Element) -> None:
    perplexity = page.id("perplexity")
    assert len(perplexity.all("svg", "panel")) == 2
    assert len(marks(perplexity)) == len(csv_rows(perplexity, "perplexity.csv")) == 2 * (len(cells(sweep)) + 1)
    size = page.id("size")
    assert len(marks(size)) == 2 * len(csv_rows(size, "size.csv")) == 2 * (len(cells(sweep)) + 1)
    matching = page.id("matching")
    assert len(marks(matching)) == len(csv_rows(matching, "matching.csv")) == 11 * 7
    recovery = page.id("recovery")
    assert len(recovery.all("path", "curve")) == 11
    assert len(csv_rows(recovery, "recovery.csv")) == 11 * 60


def test_cells_table_has_every_cell_and_marks_the_boundary(sweep: Path, page: Element) -> None:
    written = csv_rows(page.id("cells"), "cells.csv")
    assert {row["cell"] for row in written} == {cell["cell"] for cell in cells(sweep)} | {"dense"}
    marked = {row["cell"]: row["mark"] for row in written if row["mark"]}
    assert marked["mixt-last-6"] == "last on the plateau"
    assert marked["mixt-last-7"] == "boundary"
    lines = page.id("cells").all("tbody")[0].all("tr")
    assert len(lines) == len(written) + 4  # a line with the name above each series


def test_resources_stand_beside_dense(page: Element) -> None:
    section = page.id("resources").text()
    assert "28.12 M−37.5 %" in section
    assert "×, slower" in section and "×, faster" in section


def test_settings_seeds_environment_and_command_are_there(sweep: Path, page: Element) -> None:
    settings = json.loads((sweep / "sweep.json").read_text())["settings"]
    assert json.loads(download(page.id("settings"), "sweep.yaml")) == settings
    assert "seed: recipe.seed0" in page.id("settings").text()
    assert "2026-01-02" in page.id("settings").text()
    assert "abc1234" in page.id("environment").text()
    assert "tensormix sweep sweep.yaml" in page.id("reproduce").text()


def test_notes_say_chance_questions_and_interval(page: Element) -> None:
    notes = page.id("notes").text()
    for words in ("25 %", "600 questions", "95 % interval", "trained once", "All 30 cells of the sweep are finished"):
        assert words in notes


def test_unfinished_cells_are_listed(tmp_path: Path) -> None:
    page = page_of(write_sweep(tmp_path / "sweep", unfinished=3, nulls=False, first=False))
    assert "3 of 12 cells are not finished" in page.all("p", "banner")[0].text()
    lines = [row.text() for row in page.id("unfinished").all("tbody")[0].all("tr")]
    assert [line for line in lines if "mixt-last-10" in line and "not finished" in line and "compress, recover" in line]
    assert [line for line in lines if "mixt-last-11" in line and "not started" in line]
    notes = page.id("notes").text()
    assert "mixt-last-9, mixt-last-10, mixt-last-11" in notes
    assert "No null baseline" in notes and "No front-to-back" in notes
    assert len(csv_rows(page.id("accuracy"), "accuracy.csv")) == 9


def test_a_sweep_with_nothing_finished_still_gives_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    cell = {"cell": "a", "folder": "a", "depth": 1, "direction": "last", "method": "mixt", "num_branches": 4}
    (folder / "sweep.json").write_text(json.dumps({"settings": {"model": "m"}, "cells": [cell], "boundary": []}))
    page = page_of(folder)
    assert "is not known yet" in page.all("h1")[0].text()
    assert "No cell has been evaluated yet" in page.id("boundary").text()
    assert "1 of 1 cell is not finished" in page.all("p", "banner")[0].text()


def test_a_stage_that_only_some_cells_lack_is_named(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", depths=(1, 2, 3), nulls=False, first=False)
    (folder / "mixt-last-2" / "profile.json").unlink()
    assert "Without profile.json, so without its numbers: mixt-last-2." in page_of(folder).id("notes").text()


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    evil = 'x<script>alert("1")</script>&amp;'
    folder = write_sweep(tmp_path / "sweep", model=evil, depths=(1, 2), nulls=False, first=False)
    write_run(folder / "odd", model=evil)
    html = build_report([folder]).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert html.count("<script") == 1
    assert evil in page_of(folder).all("p", "eyebrow")[0].text()


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", depths=(1, 2, 3), nulls=False, first=False)
    path = folder / "mixt-last-3" / "evaluate.json"
    content = json.loads(path.read_text())
    next(row for row in content["rows"] if row["kind"] == "perplexity")["value"] = float("inf")
    path.write_text(json.dumps(content))
    page = page_of(folder)
    assert "inf" not in {row["perplexity"] for row in csv_rows(page.id("perplexity"), "perplexity.csv")}


def test_same_input_same_bytes(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", depths=(1, 2, 3))
    first = build_report([folder]).read_bytes()
    assert build_report([folder], tmp_path / "again.html").read_bytes() == first
    assert [path.name for path in folder.iterdir() if path.is_file()].count("report.html") == 1
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
