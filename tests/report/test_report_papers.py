"""Every figure of the two papers is drawn where its rows are, from those rows and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_pages import copied, rows_of
from report_page import Element, csv_rows, marks, page_of

from tensormix.report.measures import Record
from tensormix.report.published import PUBLISHED, numbers_of
from tensormix.report.read import Row

ASKED = {"[M]": "1b 1c 2 3a 3c 4a 4b", "[R]": "1 2 3 4 5 6 7 8 9 10 11 12 18 19"}


@pytest.fixture(scope="module")
def sweep(real_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(real_sweep, tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def run(real_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(real_run, tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def pages(sweep: Path, run: Path) -> dict[str, Element]:
    return {"sweep": page_of(sweep), "run": page_of(run)}


def figures(pages: dict[str, Element]) -> dict[str, Element]:
    return {figure.attrs["id"]: figure for page in pages.values() for figure in page.all("figure")}


def test_the_table_names_every_figure_that_is_asked_for() -> None:
    known = [item.number for item in PUBLISHED]
    for paper, numbers in ASKED.items():
        for number in numbers.split():
            assert any(name.startswith(f"{paper} Fig. {number}") for name in known), (paper, number)
    assert {"[M] Table 1", "[R] Table 1", "[R] Table 3", "[R] Table 4"} <= set(known)
    assert all(callable(item.draw) and item.caption and item.needs for item in PUBLISHED)


def test_real_rows_give_all_figures_and_no_column_is_empty(pages: dict[str, Element]) -> None:
    """A key that a stage renames leaves a figure, or a column behind it, empty."""
    found = figures(pages)
    ids = {element.attrs["id"] for page in pages.values() for element in page.all() if "id" in element.attrs}
    assert {item.key for item in PUBLISHED} <= ids
    for key, figure in found.items():
        rows = csv_rows(figure, f"{key}.csv")
        assert rows and (marks(figure) or figure.all(cls="heat")), key
        assert not {name for name in rows[0] if not any(row[name] for row in rows)} - {"num_branches"}, key
        caption = " ".join(figure.all("figcaption")[0].text().split())
        assert not numbers_of(key) or f"As {numbers_of(key)}, measured on these runs." in caption
    for page, name in ((pages["sweep"], "cells"), (pages["run"], "storage"), (pages["run"], "details")):
        rows = csv_rows(page, f"{name}.csv")
        filled = {column for column in rows[0] if any(row[column] for row in rows)}
        assert set(rows[0]) - filled <= {"mark", "macro_drop"}, name  # the drop needs lm-eval


def test_what_was_not_measured_is_not_drawn(sweep: Path, tmp_path: Path) -> None:
    folder = copied(sweep, tmp_path)
    for path in folder.rglob("diagnose.json"):
        path.unlink()
    there = {figure.attrs["id"] for figure in page_of(folder).all("figure")}
    assert not there & {"residual", "block-compress", "drift-map", "drift-means"} and "accuracy" in there


def test_the_dense_trends_are_those_that_were_published(pages: dict[str, Element]) -> None:
    figure = pages["sweep"].id("entropy-trends")
    rows = csv_rows(figure, "entropy-trends.csv")
    assert {row["measure"] for row in rows} == {"output_entropy", "spread"}
    for row in rows:
        accuracy, trend = float(row["accuracy"]), float(row["published_trend"])
        line = 1.20 - 1.30 * accuracy if row["measure"] == "output_entropy" else -0.90 + 4.87 * accuracy
        assert trend == pytest.approx(line)
    assert len(marks(figure)) == len(rows)
    caption = " ".join(figure.all("figcaption")[0].text().split())
    assert "gives neither its width nor the points" in caption and "±0.1 and ±0.4, our choice" in caption


def test_bits_saved_leave_the_embeddings_out() -> None:
    def sizes(num: int) -> Row:
        return Row(bytes={"float32": num}, dtype="float32", embedding_bytes=200)

    item = Record("a", resources=sizes(600), dense_resources=sizes(1000))
    assert item.bits_saved == pytest.approx(50)  # 400 of the 800 that are not embeddings
    assert Record("a", resources=sizes(600)).bits_saved is None


def test_trade_offs_hold_every_profiled_run_and_arrows_begin_before_recovery(
    run: Path, pages: dict[str, Element]
) -> None:
    figure = pages["run"].id("tradeoff")
    rows = csv_rows(figure, "tradeoff.csv")
    texts = {row["text"]: row["value"] for row in rows_of(run, "evaluate", "perplexity")}
    before = {row["text"]: row["value"] for row in rows_of(run, "direct", "perplexity")}
    for stage, truth in (("end", texts), ("direct", before)):
        written = {row["measure"]: float(row["value"]) for row in rows if row["stage"] == stage}
        assert {name: written[name] for name in truth} == truth
    dense, own = (next(row for row in rows_of(run, "profile", "resources") if row["model"] == model)
                  for model in ("dense", "compressed"))  # fmt: skip
    of = dense["bytes"][own["dtype"]]
    saved = 100 * (of - own["bytes"][own["dtype"]]) / (of - dense["embedding_bytes"])
    ends = [float(row["bits_saved_percent"]) for row in rows if row["stage"] == "end"]
    assert ends == pytest.approx([saved] * len(ends)) and len(ends) >= len(texts)
    begins = [row for row in rows if row["stage"] == "direct"]
    assert len(marks(figure)) == len(rows) and len(begins) >= len(before)
    assert sum("before recovery" in mark.text() for mark in marks(figure)) == len(begins)
    assert any("before recovery" in item.text() for item in figure.all("li"))


def test_residual_marks_are_coloured_by_perplexity(pages: dict[str, Element]) -> None:
    figure = pages["sweep"].id("residual")
    rows, drawn = csv_rows(figure, "residual.csv"), marks(figure)
    at = {float(mark.attrs["data-x"]): mark.attrs["style"] for mark in drawn}
    angles = {float(row["perplexity"]): float(row["angle_degrees"]) for row in rows}
    assert len(drawn) == len(rows)
    colours = [next(style for x, style in at.items() if x == pytest.approx(angles[y])) for y in sorted(angles)]
    assert colours[0] == "fill:#00224e" and colours[-1] == "fill:#fee838"  # the least perplexity is the dark end


def test_figures_of_the_dense_model_show_its_rows(sweep: Path, run: Path, pages: dict[str, Element]) -> None:
    def shown(key: str, name: str) -> list[float]:
        return [float(row[name]) for row in csv_rows(figures(pages)[key], f"{key}.csv") if row[name]]

    dropped = [row["value"] for folder in (run / "dense", run) for row in rows_of(folder, "diagnose", "sensitivity")
               if row["change"] == "drop"]  # fmt: skip
    assert shown("block-drop", "perplexity") == dropped[:4]
    folders = [cell for cell in sorted(sweep.iterdir()) if (cell / "diagnose.json").exists()]
    compressed = [
        [r["value"] for r in rows_of(f, "diagnose", "sensitivity") if r["change"] == "compress"] for f in folders
    ]
    found = csv_rows(pages["sweep"].id("block-compress"), "block-compress.csv")
    assert [float(row["perplexity"]) for row in found] in compressed
    measured = [rows_of(folder, "diagnose") for folder in (run / "dense", run)]
    for key, kind, column in (("spectra", "spectrum", "exponent"), ("spectral-gap", "spectral_gap", "value")):
        truth = [[row[column] for row in rows if row["kind"] == kind and row[column]] for rows in measured]
        assert shown(key, column) in truth
        assert len(marks(figures(pages)[key])) == len(shown(key, column)) * (2 if key == "spectral-gap" else 1)
    gaps = csv_rows(pages["run"].id("spectral-gap"), "spectral-gap.csv")
    assert all(float(row["value"]) < float(row["bound"]) for row in gaps)


def test_tables_of_details_and_storage(run: Path, pages: dict[str, Element]) -> None:
    details = {row["run"]: row for row in csv_rows(pages["run"], "details.csv")}
    (last,) = rows_of(run, "diagnose", "residual_last")
    own = details[run.name]
    assert (float(own["angle_degrees"]), float(own["norm_ratio"])) == (last["angle"], last["norm_ratio"])
    storage = csv_rows(pages["run"], "storage.csv")
    sites = rows_of(run, "compress")
    dense = next(row for row in rows_of(run, "profile", "resources") if row["model"] == "dense")
    whole = dense["parameters"] * (1 - dense["embedding_bytes"] / dense["bytes"][dense["dtype"]])
    for row in storage:
        roles = ("q", "k", "v", "o") if row["target"] == "attention" else ("gate", "up", "down")
        group = [site for site in sites if site["role"] in roles and site["method"] == row["method"]]
        before, after = (sum(site[key] for site in group) for key in ("dense_parameters", "parameters"))
        assert int(row["sites"]) == len(group) > 0
        assert float(row["local_ratio"]) == pytest.approx(before / after)
        assert float(row["saved"]) == pytest.approx((before - after) / whole)
    assert sum(int(row["sites"]) for row in storage) == len(sites)
