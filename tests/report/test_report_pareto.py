"""The page of a comparison: means over seeds, the frontier as by definition, nothing hidden."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_pages import change, change_rows, copied, rows_of
from report_page import csv_rows, page_of

from tensormix.report import build_report
from tensormix.report.pareto import Entry, Measure, Spread, entries, frontier, measures_of
from tensormix.report.read import Row, read_contest

SEED = {"low-0.5-s0": "low-0.5-s7"}  # a second seed is a copy of the first with another perplexity


@pytest.fixture
def folder(real_comparison: Path, tmp_path: Path) -> Path:
    return copied(real_comparison, tmp_path, at="comparison")


def cells(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "comparison.json").read_text())["cells"]


def test_every_measured_cell_is_drawn_where_it_was_measured(folder: Path) -> None:
    page = page_of(folder)
    dense = json.loads((folder / "comparison.json").read_text())["dense"]["bits"]
    rows = csv_rows(page.id("pareto"), "pareto.csv")
    done = [cell for cell in cells(folder) if (folder / cell["folder"] / "evaluate.json").exists()]
    assert {(row["method"], float(row["keep"])) for row in rows} == {(cell["label"], cell["keep"]) for cell in done}
    for cell in (cell for cell in done if cell["seed"] == 0):
        (row,) = [row for row in rows if (row["method"], float(row["keep"])) == (cell["label"], cell["keep"])]
        alone = int(row["seeds"]) == 1
        for kind in ("perplexity", "kl"):
            (truth,) = rows_of(folder / cell["folder"], "evaluate", kind)
            assert not alone or float(row[f"{kind} {truth['text']}"]) == truth["value"]
        assert not alone or float(row["stored bits, dense = 1"]) == cell["bits"] / dense
    impossible = {cell["impossible"] for cell in cells(folder) if cell["impossible"]}
    assert impossible and all(reason in page.id("impossible").text() for reason in impossible)


def test_seeds_are_together_with_their_spread(folder: Path) -> None:
    copied(folder / "low-0.5-s0", folder, at="low-0.5-s7")
    change_rows(folder / "low-0.5-s0", "evaluate", "perplexity", value=9.0)
    change_rows(folder / "low-0.5-s7", "evaluate", "perplexity", value=11.0)

    def plant(content: dict[str, Any]) -> None:
        content["cells"] = [cell for cell in content["cells"] if cell["label"] != "low" or cell["cell"] == "low-0.5-s0"]
        first = next(cell for cell in content["cells"] if cell["label"] == "low")
        content["cells"].append({**first, "cell": "low-0.5-s7", "folder": "low-0.5-s7", "seed": 7})

    change(folder / "comparison.json", plant)
    found = {(item.label, item.keep): item for item in entries(read_contest(folder))}
    (measure,) = [measure for measure in measures_of([*found.values()]) if measure.kind == "perplexity"]
    assert measure.of(found["low", 0.5]) == Spread(10.0, 9.0, 11.0)
    assert "9 to 11" in page_of(folder).id("table").text()


def test_the_frontier_is_marked_and_the_best_is_named(folder: Path) -> None:
    for cell in cells(folder):
        if (folder / cell["folder"] / "evaluate.json").exists():
            value = 3.0 if cell["label"] == "low" else 5.0 + cell["keep"]
            change_rows(folder / cell["folder"], "evaluate", "perplexity", value=value)
    items = entries(read_contest(folder))
    (measure,) = [measure for measure in measures_of(items) if measure.kind == "perplexity"]
    best = frontier(items, lambda item: item.stated("bits"), measure.of)
    page = page_of(folder)
    for line in page.id("table").all("tbody")[0].all("tr"):
        if line.all("td"):
            cells_text = [cell.text() for cell in line.all("td")]
            title = line.all("th")[0].text()
            marked = any(item.title == title and f"{item.stated('achieved_keep').mean:.4f}" == cells_text[1]  # type: ignore[union-attr]
                         for item in best)  # fmt: skip
            assert not marked or "●" in line.text()
    assert "best is low at 0.5" in page.all("h1")[0].text()
    assert "All methods beat them." in page.all("p", "lead")[0].text()


def test_what_does_not_beat_the_null_baselines_is_named(folder: Path) -> None:
    for seed in folder.glob("low-0.5-s*"):
        change_rows(seed, "evaluate", "perplexity", value=1e9)
    assert "No better than the best of them: low at 0.5." in " ".join(
        page_of(folder).all("p", "lead")[0].text().split()
    )


def test_text_is_escaped_and_the_same_files_give_the_same_bytes(folder: Path) -> None:
    for path in folder.glob("*/evaluate.json"):
        change_rows(path.parent, "evaluate", "perplexity", text="book <1>")
    html = build_report([folder]).read_text()
    assert "book &lt;1&gt;" in html and "<1>" not in html
    assert html == build_report([folder]).read_text()


def test_an_unfinished_comparison_has_a_page(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*/evaluate.json"):
        path.unlink()
    assert "No cell of the comparison" in build_report([folder]).read_text()
    change(folder / "comparison.json", lambda content: content.update(cells=[{"cell": "x"}]))
    with pytest.raises(ValueError, match=r"comparison\.json: one of 'cells' lacks folder"):
        build_report([folder])


def test_a_comparison_is_not_put_beside_runs(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is a comparison, .* report each comparison alone"):
        build_report([folder, folder / "low-0.5-s0"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8), st.sampled_from([1, -1]))
def test_the_frontier_is_what_nothing_dominates(points: list[tuple[int, int]], sign: int) -> None:
    items = [Entry(str(i), "m", 0.5, False, [Row(bits=x, y=y)], [], []) for i, (x, y) in enumerate(points)]
    found = frontier(items, lambda e: e.stated("bits"), lambda e: e.stated("y"), sign_x=sign)
    kept = {points[int(item.label)] for item in found}
    undominated = {p for p in points if not any(q != p and sign * q[0] <= sign * p[0] and q[1] <= p[1] for q in points)}
    assert kept == undominated


def test_a_divergence_of_the_dense_model_is_zero() -> None:
    assert Measure("kl", "text").sign == 1 and Measure("accuracy").sign == -1
    assert not re.search("accuracy", Measure("kl", "text").name)
