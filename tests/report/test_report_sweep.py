"""The page of a sweep holds every value that real stages measured, and says what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from real_pages import cells_of, change, change_rows, copied, model_of, rows_of, set_boundary
from report_page import Element, csv_rows, download, marks, page_of

from tensormix.report import build_report

FIGURES = ("accuracy", "drift-map", "drift-means", "perplexity", "size", "recovery", "matching", "tradeoff", "scaling")


@pytest.fixture(scope="module")
def sweep(real_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real one with a boundary where the headline has something to say (a model of noise has none)."""
    folder = copied(real_sweep, tmp_path_factory.mktemp("report"))
    set_boundary(folder, value=3, last_good=2, low=3, high=4)
    return folder


@pytest.fixture(scope="module")
def page(sweep: Path) -> Element:
    return page_of(sweep)


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


def test_headline_answers_in_one_sentence(sweep: Path, page: Element) -> None:
    blocks = f"2 of 4 blocks of {model_of(sweep)}"
    assert page.all("h1")[0].text() == f"{blocks} can be replaced before exam accuracy leaves its plateau"
    lead = " ".join(page.all("p", "lead")[0].text().split())
    assert "the boundary is at NB = 3 (95 % interval 3 to 4)" in lead
    costs = {row["model"]: row for row in rows_of(sweep / "last-02-mixt2", "profile", "resources")}
    for key, name in (("parameters", "parameters"), ("macs_per_token", "MACs per token")):
        shift = 100 * (costs["compressed"][key] / costs["dense"][key] - 1)
        words = "±0" if abs(shift) < 0.05 else f"{shift:+.1f}".replace("-", "−")
        assert f"{words} % {name}" in lead.replace("\u00a0", " ")
    for row in rows_of(sweep / "last-02-mixt2", "profile", "latency"):
        assert row["model"] == "dense" or f"{row['speedup']:.2f}×" in lead or "equally fast" in lead


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"value": None, "low": None, "high": None, "last_good": 4}, "does not leave its plateau up to 4 of 4 blocks"),
        ({"value": 1, "low": 1, "high": 1, "last_good": 0}, "No block of MODEL can be replaced"),
        ({"value": 4, "low": 3, "high": None, "last_good": 1}, "1 of 4 blocks of MODEL can be replaced"),
    ],
)
def test_headline_of_other_boundaries(sweep: Path, tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    folder = copied(sweep, tmp_path)
    set_boundary(folder, **values)
    page = page_of(folder)
    assert sentence.replace("MODEL", model_of(sweep)) in page.all("h1")[0].text()
    lead = page.all("p", "lead")[0].text()
    assert ("interval 3 or later" in lead) == ("Depths 2 to 3 were not scanned" in lead) == (values["value"] == 4)


@pytest.mark.parametrize("value", [2, 3, None])
def test_a_null_baseline_that_comes_as_far_is_named(sweep: Path, tmp_path: Path, value: int | None) -> None:
    """Two depths are too few for a boundary of the baseline, so its row is planted."""
    folder = copied(sweep, tmp_path)

    def plant(content: dict[str, Any]) -> None:
        main = next(row for row in content["boundary"] if row["kind"] == "boundary" and row["direction"] == "last")
        kept = [row for row in content["boundary"] if row.get("method", "mixt") == "mixt"]
        content["boundary"] = kept
        kept.append({**main, "method": "zero", "variant": None, "num_branches": None, "value": value})

    change(folder / "sweep.json", plant)
    lead = page_of(folder).all("p", "lead")[0].text()
    assert f"the plateau ends {'never' if value is None else f'at {value}'} for zeroed linears" in lead
    assert ("MixT does not outlast zeroed linears in this sweep." in lead) == (value != 2)


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
    written = {(row["method"], row["direction"], row["N_B"]): row for row in csv_rows(figure, "accuracy.csv")}
    assert len(written) == len(cells_of(sweep)) + 1
    places = {(cell["method"], cell["direction"], str(cell["depth"])): cell["folder"] for cell in cells_of(sweep)}
    for key, row in written.items():
        folder = sweep / places.get(key, "dense")
        truth = next(item for item in rows_of(folder, "evaluate", "accuracy") if item["subject"] == "all")
        for column, name in (("accuracy", "value"), *((name, name) for name in ("low", "high", "num_questions"))):
            assert float(row[column]) == truth[name]
        assert float(row["OE"]) == rows_of(folder, "diagnose", "output_entropy")[0]["value"]
        assert float(row["PE"]) == rows_of(folder, "diagnose", "prediction_entropy")[0]["value"]
    panels = figure.all("svg", "panel")
    back = [row for row in written.values() if row["direction"] == "last"]
    both = [row for row in written.values() if row["method"] in ("mixt", "dense")]
    columns = ("accuracy", "accuracy", "OE", "PE")
    for panel, expected, column in zip(panels, (back, both, back, back), columns, strict=True):
        drawn = sorted((float(mark.attrs["data-x"]), float(mark.attrs["data-y"])) for mark in panel.all(cls="mark"))
        truth = sorted((float(row["N_B"]), float(row[column])) for row in expected)
        assert drawn == [pytest.approx(pair, rel=1e-8) for pair in truth]
    assert len(panels[0].all(cls="bar")) == len(back)


def test_the_boundary_is_marked_on_every_drawing_of_depth(page: Element) -> None:
    for name in ("accuracy", "drift-map", "drift-means", "perplexity"):
        for panel in page.id(name).all("svg", "panel"):
            (line,) = panel.all("path", "boundary")
            assert line.attrs["data-x"] == "3" and "boundary NB = 3" in panel.text()
            (band,) = panel.all(cls="interval") or panel.all(cls="interval-rule")
            assert (band.attrs["data-low"], band.attrs["data-high"]) == ("3", "4")


def test_drift_figures_hold_every_measured_value(sweep: Path, page: Element) -> None:
    squares = page.id("drift-map").all("rect", "heat")
    assert len(squares) == len(csv_rows(page.id("drift-map"), "drift-map.csv"))
    for depth in (1, 2, 3, 4):
        truth = {
            row["layer"]: row["value"] for row in rows_of(sweep / f"last-0{depth}-mixt2", "diagnose", "drift_profile")
        }
        drawn = {
            int(s.attrs["data-y"]): float(s.attrs["data-value"]) for s in squares if s.attrs["data-x"] == str(depth)
        }
        assert drawn == pytest.approx(truth, rel=1e-5)
        means = {
            row["region"]: row["value"] for row in rows_of(sweep / f"last-0{depth}-mixt2", "diagnose", "drift_mean")
        }
        shown = [row for row in csv_rows(page.id("drift-means"), "drift-means.csv") if row["N_B"] == str(depth)]
        assert {row["region"]: float(row["mean_drift"]) for row in shown} == {
            key: means[key] for key in ("all", "output")
        }
    fit = next(
        row for row in json.loads((sweep / "sweep.json").read_text())["boundary"] if row["kind"] == "drift_crossing"
    )
    assert f"up to NB = {fit['value']:.4g}" in " ".join(page.id("drift-means").all("figcaption")[0].text().split())
    assert len(page.id("drift-means").all("path", "fit")) == 1


def test_other_figures_draw_every_row(sweep: Path, page: Element) -> None:
    checkpoints = len(cells_of(sweep)) + 1
    texts = len(rows_of(sweep / "dense", "evaluate", "perplexity"))
    drawn = marks(page.id("perplexity"))
    assert len(drawn) == len(csv_rows(page.id("perplexity"), "perplexity.csv")) == texts * checkpoints
    assert len(marks(page.id("size"))) == 2 * len(csv_rows(page.id("size"), "size.csv")) == 2 * checkpoints
    deepest = rows_of(sweep / "last-04-mixt2", "compress")
    assert len(marks(page.id("matching"))) == len(csv_rows(page.id("matching"), "matching.csv")) == len(deepest)
    recovery = page.id("recovery")
    assert len(recovery.all("path", "curve")) == 4
    losses = [
        row["loss"] for depth in range(1, 5) for row in rows_of(sweep / f"last-0{depth}-mixt2", "recover", "loss")
    ]
    assert [float(row["loss"]) for row in csv_rows(recovery, "recovery.csv")] == losses


def test_tables_have_every_cell_and_mark_the_boundary(sweep: Path, page: Element) -> None:
    written = csv_rows(page.id("cells"), "cells.csv")
    assert {row["cell"] for row in written} == {cell["cell"] for cell in cells_of(sweep)} | {"dense"}
    marked = {row["cell"]: row["mark"] for row in written if row["mark"]}
    assert marked == {"last-02-mixt2": "last on the plateau", "last-03-mixt2": "boundary"}
    lines = page.id("cells").all("tbody")[0].all("tr")
    series = {(cell["method"], cell["direction"]) for cell in cells_of(sweep)}
    assert len(lines) == len(written) + len(series)  # a line with the name above each series
    assert [line.all("th")[0].text() for line in page.id("cells").all("tr", "marked")] == ["2", "3"]
    for row in rows_of(sweep / "last-02-mixt2", "profile", "latency"):
        if row["model"] == "compressed":
            assert f"{row['median_ms']:.3g} ms{row['speedup']:.2f}×" in page.id("resources").text()


def test_settings_seeds_environment_and_command_are_there(sweep: Path, page: Element) -> None:
    settings = json.loads((sweep / "sweep.json").read_text())["settings"]
    assert json.loads(download(page.id("settings"), "sweep.yaml")) == settings
    assert "seed: recipe.seed0" in page.id("settings").text()
    assert (
        json.loads((sweep / "sweep.json").read_text())["environment"]["versions"]["torch"]
        in page.id("environment").text()
    )
    assert "tensormix sweep sweep.yaml" in page.id("reproduce").text()


def test_notes_say_chance_questions_and_interval(sweep: Path, page: Element) -> None:
    notes = page.id("notes").text()
    finished = f"All {len(cells_of(sweep)) + 1} cells of the sweep are finished"
    num_questions = rows_of(sweep / "dense", "evaluate", "accuracy")[0]["num_questions"]
    for words in ("25 %", f"{num_questions} questions", "95 % interval", "trained once", finished):
        assert words in notes
    assert "No null baseline" not in notes and "No front-to-back" not in notes


def test_unfinished_cells_are_listed(real_unfinished_sweep: Path, tmp_path: Path) -> None:
    page = page_of(copied(real_unfinished_sweep, tmp_path))
    banner = " ".join(page.all("p", "banner")[0].text().split())
    missing, num_cells = len(page.id("unfinished").all("tbody")[0].all("tr")), len(cells_of(real_unfinished_sweep)) + 1
    assert f"{missing} of {num_cells} cells are not finished" in banner
    lines = [row.text() for row in page.id("unfinished").all("tbody")[0].all("tr")]
    assert [line for line in lines if "last-04-mixt2" in line and "not finished" in line and "compress" in line]
    assert [line for line in lines if "first-02-mixt2" in line and "not started" in line]
    notes = page.id("notes").text()
    assert "last-04-mixt2, first-0" in notes and "No front-to-back" in notes
    assert len(csv_rows(page.id("accuracy"), "accuracy.csv")) == num_cells - missing


def test_a_sweep_without_mixt_back_to_front_waits_for_no_boundary_of_it(sweep: Path, tmp_path: Path) -> None:
    folder = copied(sweep, tmp_path)
    data = json.loads((folder / "sweep.json").read_text())
    for row in [*data["cells"], *data["boundary"]]:
        if row.get("direction") == "last":
            row["direction"] = "middle_to_late"
    (folder / "sweep.json").write_text(json.dumps(data))
    page = page_of(folder)
    assert "side by side" in page.all("h1")[0].text() and model_of(sweep) in page.all("h1")[0].text()
    assert "boundary is at" not in page.all("p", "lead")[0].text()
    data["cells"] = [row for row in data["cells"] if (row["method"], row["direction"]) == ("mixt", "middle_to_late")]
    (folder / "sweep.json").write_text(json.dumps(data))
    assert page_of(folder).all("h1")[0].text() == f"1 way to replace blocks of {model_of(sweep)}"


def test_mixt_at_too_few_depths_has_no_boundary_yet(sweep: Path, tmp_path: Path) -> None:
    folder = copied(sweep, tmp_path)
    change(folder / "sweep.json", lambda content: content.update(boundary=[]))
    assert "is not known yet" in page_of(folder).all("h1")[0].text()


def test_a_sweep_with_nothing_finished_still_gives_a_page(real_sweep: Path, tmp_path: Path) -> None:
    content = json.loads((real_sweep / "sweep.json").read_text())
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(content | {"boundary": []}))
    page = page_of(tmp_path / "sweep")
    assert "is not known yet" in page.all("h1")[0].text()
    assert "No cell has been evaluated yet" in page.id("boundary").text()
    num_cells = len(content["cells"])
    assert f"{num_cells} of {num_cells} cells" in page.all("p", "banner")[0].text()


def test_a_stage_that_only_some_cells_lack_is_named(sweep: Path, tmp_path: Path) -> None:
    folder = copied(sweep, tmp_path)
    (folder / "last-02-mixt2" / "profile.json").unlink()
    page = page_of(folder)
    assert "Without profile.json, so without its numbers: last-02-mixt2." in page.id("notes").text()
    assert "NB = 2 has not been profiled." in page.all("p", "lead")[0].text()


def test_text_from_files_is_escaped(real_sweep: Path, tmp_path: Path) -> None:
    evil = 'x<script>alert("1")</script>&amp;'
    folder = copied(real_sweep, tmp_path)
    change(folder / "sweep.json", lambda content: content["settings"]["recipe"].update(model=evil))
    change_rows(folder / "last-02-mixt2", "evaluate", "perplexity", text=evil)
    html = build_report([folder]).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert html.count("<script") == 1
    page = page_of(folder)
    assert evil in page.all("p", "eyebrow")[0].text()
    assert {evil} < {row["text"] for row in csv_rows(page.id("perplexity"), "perplexity.csv")}


def test_values_that_are_not_finite_are_left_out(real_sweep: Path, tmp_path: Path) -> None:
    folder = copied(real_sweep, tmp_path)
    change_rows(folder / "last-03-mixt2", "evaluate", "perplexity", value=float("inf"))
    page = page_of(folder)
    assert "inf" not in {row["perplexity"] for row in csv_rows(page.id("perplexity"), "perplexity.csv")}


def test_same_input_same_bytes(real_sweep: Path, tmp_path: Path) -> None:
    folder = copied(real_sweep, tmp_path)
    first = build_report([folder]).read_bytes()
    assert build_report([folder], tmp_path / "again.html").read_bytes() == first
    assert [path.name for path in folder.iterdir() if path.is_file()].count("report.html") == 1
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]
