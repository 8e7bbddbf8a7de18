"""Every figure of the two papers is drawn where its rows are, from those rows and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from measured import dense_rows, measure_everything, pair_rows
from report_folders import fall, write_run, write_sweep
from report_page import Element, csv_rows, marks, page_of

from tensormix.report.measures import Record
from tensormix.report.published import PUBLISHED, numbers_of

DEPTHS = (1, 4, 7, 8)
ASKED = {"[M]": "1b 1c 2 3a 3c 4a 4b", "[R]": "1 2 3 4 5 6 7 8 9 10 11 12 18 19"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_sweep(tmp_path_factory.mktemp("papers") / "sweep", depths=DEPTHS)
    return measure_everything(made, {f"mixt-last-{d}": (fall("mixt", "last", d), d) for d in DEPTHS})


@pytest.fixture(scope="module")
def page(folder: Path) -> Element:
    return page_of(folder)


def test_the_table_names_every_figure_that_is_asked_for() -> None:
    known = [item.number for item in PUBLISHED]
    for paper, numbers in ASKED.items():
        for number in numbers.split():
            assert any(name.startswith(f"{paper} Fig. {number}") for name in known), (paper, number)
    assert {"[M] Table 1", "[R] Table 1", "[R] Table 3", "[R] Table 4"} <= set(known)
    assert all(callable(item.draw) and item.caption and item.needs for item in PUBLISHED)


def test_a_sweep_with_all_rows_has_all_figures(page: Element) -> None:
    ids = {element.attrs["id"]: element for element in page.all() if "id" in element.attrs}
    for item in PUBLISHED:
        if item.key == "storage":  # of one run and of a comparison
            continue
        assert item.key in ids, item
        if ids[item.key].tag == "figure":
            caption = " ".join(ids[item.key].all("figcaption")[0].text().split())
            assert f"As {numbers_of(item.key)}, measured on these runs." in caption or not numbers_of(item.key)
            assert marks(ids[item.key]) or ids[item.key].all(cls="heat")
            assert csv_rows(ids[item.key], f"{item.key}.csv")
    assert all(figure.all("svg", "panel") for figure in page.all("figure"))


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    page = page_of(write_sweep(tmp_path / "sweep", depths=(1, 2)))
    there = {figure.attrs["id"] for figure in page.all("figure")}
    assert not there & {"residual", "block-drop", "block-compress", "restoration", "spectra", "spectral-gap", "scaling"}


def test_the_dense_trends_are_those_that_were_published(page: Element) -> None:
    figure = page.id("entropy-trends")
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
    def sizes(num: int) -> dict[str, object]:
        return {"bytes": {"float32": num}, "dtype": "float32", "embedding_bytes": 200}

    item = Record("a", resources=sizes(600), dense_resources=sizes(1000))
    assert item.bits_saved == pytest.approx(50)  # 400 of the 800 that are not embeddings
    assert Record("a", resources=sizes(600)).bits_saved is None


def test_trade_offs_hold_every_profiled_run(page: Element) -> None:
    rows = csv_rows(page.id("tradeoff"), "tradeoff.csv")
    assert {row["measure"] for row in rows} == {"wikitext-2", "held-out facts", "macro_drop"}
    mixt = [row for row in rows if row["measure"] == "macro_drop" and row["stage"] == "end"]
    assert [row["N_B"] for row in mixt] == [str(depth) for depth in DEPTHS]
    saved = [float(row["bits_saved_percent"]) for row in mixt]
    assert saved == pytest.approx([100 * depth * 3 * (1 - 0.0625) / 45 for depth in DEPTHS], rel=1e-4)
    assert [float(row["value"]) for row in mixt] == pytest.approx([30 * fall("mixt", "last", d) for d in DEPTHS])


def test_arrows_lead_from_before_recovery_to_after_it(page: Element) -> None:
    figure = page.id("tradeoff")
    rows = csv_rows(figure, "tradeoff.csv")
    begins = [row for row in rows if row["stage"] == "direct"]
    assert len(begins) == 3 * len(DEPTHS)  # the null baselines were not evaluated before recovery
    for row, depth in zip(begins, 3 * DEPTHS, strict=True):
        assert float(row["bits_saved_percent"]) == pytest.approx(100 * 3 * depth / 45, rel=1e-6)
    drawn = {(float(mark.attrs["data-x"]), float(mark.attrs["data-y"])): mark for mark in marks(figure)}
    arrows = [arrow for panel in figure.all("svg", "panel") for arrow in panel.all("path", "arrow")]
    assert len(arrows) == len(begins)
    for begin, arrow in zip(begins, arrows, strict=True):
        (end,) = [row for row in rows if row["stage"] == "end" and row["series"] == begin["series"]
                  and (row["N_B"], row["measure"]) == (begin["N_B"], begin["measure"])]  # fmt: skip
        places = []
        for row in (begin, end):
            own = pytest.approx((float(row["bits_saved_percent"]), float(row["value"])), rel=1e-8)
            (mark,) = [mark for place, mark in drawn.items() if place == own]
            places.append(complex(*map(float, re.findall(r"[-\d.]+", mark.attrs["transform"]))))
        points = [complex(*map(float, pair)) for pair in re.findall(r"([-\d.]+),([-\d.]+)", arrow.attrs["d"])]
        assert abs(points[0] - places[0]) < 0.02 and abs(abs(points[1] - places[1]) - 6.5) < 0.02
        assert points[3] == points[1]  # the tip of the head
        way = (places[1] - places[0]) / abs(places[1] - places[0])
        assert abs((points[1] - points[0]) / way).real == pytest.approx(abs(points[1] - points[0]), abs=0.02)
    assert any("before recovery" in item.text() for item in figure.all("li"))
    assert sum("before recovery" in mark.text() for mark in marks(figure)) == len(begins)


def test_residual_marks_are_coloured_by_perplexity(page: Element) -> None:
    figure = page.id("residual")
    rows, drawn = csv_rows(figure, "residual.csv"), marks(figure)
    angles = [float(row["angle_degrees"]) for row in rows]
    assert angles == pytest.approx([float(mark.attrs["data-x"]) for mark in drawn])
    colours = [mark.attrs["style"] for mark in drawn]
    assert len(set(colours)) > 1 and colours[0] == "fill:#00224e"  # the least perplexity, the dark end
    assert colours[-1] == "fill:#fee838"


def test_figures_of_the_dense_model_show_its_rows(page: Element) -> None:
    dropped = [row for row in dense_rows() if row["kind"] == "sensitivity"]
    assert [float(row["perplexity"]) for row in csv_rows(page.id("block-drop"), "block-drop.csv")] == [
        row["value"] for row in dropped
    ]
    compressed = [row for row in pair_rows(0.5, 3) if row["kind"] == "sensitivity"]
    found = csv_rows(page.id("block-compress"), "block-compress.csv")
    assert [float(row["perplexity"]) for row in found] == [row["value"] for row in compressed]
    restored = [row for row in csv_rows(page.id("restoration"), "restoration.csv") if not row["row"]]
    assert len(restored) == sum(row["kind"] == "restoration" for row in dense_rows())
    panels = page.id("spectra").all("svg", "panel")
    assert len(panels) == 4 and all(len(panel.all(cls="mark")) == 24 for panel in panels)
    gaps = csv_rows(page.id("spectral-gap"), "spectral-gap.csv")
    assert len(gaps) == 8 and all(float(row["value"]) < float(row["bound"]) for row in gaps)  # the deepest cell's


def test_tables_of_details_and_storage(folder: Path) -> None:
    page = page_of(folder / "mixt-last-4", folder / "mixt-last-8", folder / "zero-last-1")
    details = csv_rows(page, "details.csv")
    assert [row["run"] for row in details] == ["dense", "mixt-last-4", "mixt-last-8"]
    assert float(details[1]["angle_degrees"]) == pytest.approx(3 + 40 * fall("mixt", "last", 4))
    assert float(details[2]["hellaswag"]) < float(details[1]["hellaswag"])
    storage = csv_rows(page, "storage.csv")
    first = storage[0]
    assert (first["run"], first["method"], first["target"], first["sites"]) == (
        "mixt-last-4",
        "mixt",
        "attention",
        "16",
    )
    assert float(first["local_ratio"]) == pytest.approx(428_571 / 26_785)
    assert float(first["saved"]) == pytest.approx(16 * (428_571 - 26_785) / 45_000_000)
    assert {"tradeoff", "residual", "operators"} <= {figure.attrs["id"] for figure in page.all("figure")}


def test_a_run_alone(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder / "mixt-last-4")
    there = {figure.attrs["id"] for figure in page.all("figure")}
    assert {"residual", "tradeoff", "block-compress", "spectral-gap", "operators"} <= there
    assert csv_rows(page, "storage.csv") and "scaling" not in there
    plain = page_of(write_run(tmp_path / "plain"))
    assert not {figure.attrs["id"] for figure in plain.all("figure")} & {"residual", "spectral-gap", "block-drop"}
