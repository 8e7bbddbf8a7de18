"""Drawings by themselves: values lie where the axes say, nothing from outside is drawn unescaped."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_page import Element, parse

from tensormix.report.boundary import Boundary
from tensormix.report.chart import chart
from tensormix.report.measures import Record
from tensormix.report.parts import Arrow, Cells, Level, Line, Mark, Part, Point, Series
from tensormix.report.scales import Axis, Scale, Steps, log_ticks, nice_ticks, padded, step_place
from tensormix.report.series import boundary_marks, styles_of
from tensormix.report.svg import HEIGHT, LEFT, RIGHT, SHAPES, TOP, WIDTH, Style


def test_plans_without_a_look_of_their_own_look_different():
    records = [Record(f"cell {index}", method=f"plan {index}", direction="middle_to_late") for index in range(16)]
    known = [Record("cell", method=name) for name in ("mixt", "zero", "drop_blocks", "svd")]
    assert len({(style.colour, style.shape) for style in styles_of([*records, *known]).values()}) == 20


def test_boundaries_at_one_place_are_one_mark():
    ends = {"low": 6, "high": 8, "method": "mixt", "direction": "last"}
    known = [
        Boundary({"value": value, "num_branches": branches, **ends})
        for value, branches in ((7, 2), (7, 3), (5, 4), (None, 5))
    ]
    assert [mark.label for mark in boundary_marks(known)] == ["N_B = 7 (2, 3 br.)", "N_B = 5 (4 br.)"]
    assert [mark.label for mark in boundary_marks(known[:2])] == ["boundary N_B = 7"]


BLUE, FREE = Style("c-blue"), Axis()
numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


def drawn(*parts: Part, y: Axis = FREE) -> Element:
    return parse(chart("Title", Axis("x"), y, parts).svg)


def place(mark: Element) -> complex:
    return complex(*map(float, re.findall(r"[-\d.]+", mark.attrs["transform"])))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_every_point_lies_inside_the_axes_in_the_order_of_its_values(values: list[tuple[float, float]]) -> None:
    marks = drawn(Series([Point(x, y, "tip") for x, y in values], BLUE, line=True)).all(cls="mark")
    places = [place(mark) for mark in marks]
    assert all(LEFT <= at.real <= WIDTH - RIGHT and TOP <= at.imag <= HEIGHT for at in places)
    for (x, y), at in zip(values, places, strict=True):
        for (other_x, other_y), other in zip(values, places, strict=True):
            assert x >= other_x or at.real <= other.real
            assert y >= other_y or at.imag >= other.imag  # upwards on the screen is less


def test_a_logarithmic_axis_is_linear_where_a_value_has_no_logarithm() -> None:
    gaps = []
    for values in ((1.0, 10.0, 100.0), (0.0, 50.0, 100.0)):
        points = [Point(i, y, "") for i, y in enumerate(values)]
        at = [place(mark).imag for mark in drawn(Series(points, BLUE), y=Axis(log=True)).all(cls="mark")]
        gaps.append((at[0] - at[1]) - (at[1] - at[2]))
    assert gaps == [pytest.approx(0, abs=0.05)] * 2


def test_the_first_series_lies_on_top_and_is_the_first_of_the_legend() -> None:
    one, two = (Series([Point(0, 0, name)], BLUE, name) for name in ("one", "two"))
    made = chart("Title", Axis("x"), Axis(), [one, Level(1.0, "level"), two])
    assert [mark.text() for mark in parse(made.svg).all(cls="mark")] == ["two", "one"]
    assert [entry.name for entry in made.legend] == ["one", "two"]
    classes = [item.attrs.get("class", "") for item in parse(made.svg).all("path")]
    assert classes.index("level") < min(i for i, cls in enumerate(classes) if cls.startswith("mark"))


def test_intervals_are_drawn_from_low_to_high() -> None:
    made = drawn(Series([Point(0, 0.5, "", 0.25, 0.75), Point(1, 0.25, ""), Point(2, 0.75, "")], BLUE))
    middle, low, high = map(place, made.all(cls="mark"))
    (bar,) = made.all(cls="bar")
    assert bar.attrs["d"] == f"M{middle.real:g},{low.imag:g}V{high.imag:g}"


def test_an_arrow_ends_before_the_mark_and_is_left_out_where_it_is_too_short() -> None:
    ends = Series([Point(0, 0, ""), Point(1, 1, "")], BLUE)
    made = drawn(ends, Arrow((0, 0), (1, 1), BLUE), Arrow((0, 0), (0.01, 0.01), BLUE))
    (arrow,) = made.all(cls="arrow")
    points = [complex(*map(float, pair)) for pair in re.findall(r"([-\d.]+),([-\d.]+)", arrow.attrs["d"])]
    start, stop = map(place, made.all(cls="mark"))
    along = (stop - start) / abs(stop - start)
    assert abs(points[0] - start) < 0.02 and abs(points[1] - stop) == pytest.approx(6.5, abs=0.02)
    assert points[3] == points[1]  # the tip of the head
    sides = [((point - points[1]) / along).imag for point in (points[2], points[4])]
    assert sides == [pytest.approx(3.5, abs=0.02), pytest.approx(-3.5, abs=0.02)]


def test_a_marked_position_stands_on_its_value_with_its_interval() -> None:
    points = Series([Point(x, 0.0, "") for x in (0, 4, 8)], BLUE)
    made = drawn(points, Mark(4, 2, None, "here"), Mark(9, None, None, "beyond"))
    (line,), (band,) = made.all(cls="boundary"), made.all("rect", "interval")
    assert line.attrs["d"].startswith(f"M{place(made.all(cls='mark')[1]).real:g},")
    assert float(band.attrs["x"]) == pytest.approx(
        (place(made.all(cls="mark")[0]).real + place(made.all(cls="mark")[1]).real) / 2, abs=0.01
    )
    assert float(band.attrs["x"]) + float(band.attrs["width"]) == pytest.approx(WIDTH - RIGHT)
    assert "here" in made.text() and "beyond" not in made.text()


def test_heat_cells_fill_their_steps_and_a_mark_between_two_lies_between_them() -> None:
    values = {(x, y): float(x * y) for x in (1, 3, 7) for y in range(4)}
    made = drawn(Cells(values, lambda x, y, value: f"{x} {y} {value}"), Mark(5, None, None, "between"))
    cells = {(int(c.attrs["data-x"]), int(c.attrs["data-y"])): c for c in made.all(cls="heat")}
    assert {key: float(cell.attrs["data-value"]) for key, cell in cells.items()} == values
    edges = sorted({float(cell.attrs["x"]) for cell in cells.values()})
    assert edges[0] == LEFT and edges[2] - edges[1] == pytest.approx(edges[1] - edges[0], abs=0.02)
    assert float(cells[1, 0].attrs["y"]) > float(cells[1, 3].attrs["y"])  # the first at the bottom
    assert float(re.match(r"M([\d.]+),", made.all(cls="boundary")[0].attrs["d"])[1]) == pytest.approx(
        edges[2], abs=0.02
    )  # type: ignore[index]
    assert cells[7, 3].attrs["fill"] == "#fee838" and cells[1, 0].attrs["fill"] == "#00224e"
    assert (step_place([1, 3, 7], 3), step_place([1, 3, 7], 5)) == (1.5, 2.0)


def test_text_is_escaped_and_symbols_are_set() -> None:
    evil = '<script>"&'
    made = chart(evil, Axis(evil), Axis(), [Series([Point(0, 0, evil)], BLUE, evil), Level(0, evil)])
    assert "<script" not in made.svg and "<script" not in made.legend[0].swatch
    assert parse(made.svg).all("title")[0].text() == evil
    label = parse(chart("t", Axis("N_B, number"), Axis(), [Series([Point(0, 0, "")], BLUE)]).svg)
    assert [sub.text() for sub in label.all("tspan", "sub")] == ["B"] and "NB, number" in label.text()


@pytest.mark.parametrize("shape", SHAPES)
def test_legends_show_a_line_only_where_there_is_one(shape: str) -> None:
    style, point = Style("c-blue", shape), [Point(0, 0, "")]
    parts = [
        Series(point, style, "marks"),
        Series(point, style, "both", line=True),
        Line([(0, 0), (1, 1)], style, "line"),
    ]
    entries = chart("t", Axis(), Axis(), parts).legend
    kinds = [[path.attrs["class"].split()[0] for path in parse(entry.swatch).all("path")] for entry in entries]
    assert kinds == [["mark"], ["line", "mark"], ["line"]]


def test_scales_and_ticks() -> None:
    assert nice_ticks(0, 11) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(10, 1000) == [10, 20, 50, 100, 200, 500, 1000]
    scale = Scale(1, 100, 0, 200, log=True)
    assert scale(10) == pytest.approx(100)
    for low, high in ((0.0, 1e-6), (0.42, 0.4200001), (1e6, 5e9), (-3.0, 2.0)):
        ticks = nice_ticks(low, high)
        assert ticks and all(low <= tick <= high for tick in ticks) and len(ticks) <= 7
    assert Steps(range(30), 0, 300, 12).ticks() == list(range(0, 30, 4))
    assert padded([3.0]) < (3.0, 3.0) and padded([1, 2], least=0.5) == (0.5, 2.5)
