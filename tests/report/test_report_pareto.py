"""The page of a comparison: means over seeds, the frontier as by definition, nothing hidden."""

import re

import pytest
from contest_folder import VALUES, evaluate, write, write_contest
from hypothesis import given
from hypothesis import strategies as st

from tensormix.report import build_report
from tensormix.report.pareto import Entry, Spread, entries, frontier
from tensormix.report.read import read_contest


@pytest.fixture
def folder(tmp_path):
    return write_contest(tmp_path)


def test_seeds_are_together_with_their_spread(folder):
    found = {(item.label, item.keep): item for item in entries(read_contest(folder))}
    assert set(found) == set(VALUES)
    assert found["low", 0.5].quality("perplexity", "book <1>") == Spread(10.0, 9.0, 11.0)
    assert found["low", 0.25].quality("kl", "book <1>") == Spread(pytest.approx(4.2), 4.0, 4.4)
    assert found["small", 0.5].bits == Spread(590, 590, 590) and found["small", 0.5].speed(1).mean == 1.0


def test_the_page_marks_the_frontier_and_shows_every_cell(folder):
    page = build_report([folder]).read_text()
    marked = re.findall(r'<tr class="marked"><th scope="row">(\w+)</th>', page)
    assert sorted(marked) == ["drop_blocks", "low", "small", "small"]  # low at 0.25; at 0.5 small is smaller and better
    drawn = re.search(r'<figure id="pareto".*?</figure>', page, re.S)[0]
    for label, (bits, seeds) in VALUES.items():
        mean = sum(seeds) / len(seeds)
        assert f'data-x="{bits / 1000:.10g}" data-y="{mean:.10g}"' in drawn, label
    assert "dense model: 4" in drawn and "book &lt;1&gt;" in page and "<1>" not in page
    assert "no &amp; no" in page
    assert "best is small at 0.5, low at 0.25" in page
    assert page == build_report([folder]).read_text()


def test_what_does_not_beat_the_null_baselines_is_named(folder):
    write(folder / "low-0.5-s0" / "evaluate.json", evaluate(90.0))
    assert "No better than the best of them: low at 0.5." in build_report([folder]).read_text()


def test_an_unfinished_comparison_has_a_page(tmp_path):
    write(tmp_path / "comparison.json", {"settings": {}, "cells": []})
    assert "No cell of the comparison" in build_report([tmp_path]).read_text()
    write(tmp_path / "comparison.json", {"settings": {}, "cells": [{"cell": "x"}]})
    with pytest.raises(ValueError, match="must hold 'cells', a list of objects with a folder"):
        build_report([tmp_path])


def test_a_comparison_is_not_put_beside_runs(folder):
    with pytest.raises(
        ValueError, match="is a comparison, and only runs can be compared; report each comparison alone"
    ):
        build_report([folder, folder / "low-0.5-s0"])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8))
def test_the_frontier_is_what_nothing_dominates(points):
    items = [Entry(str(i), "m", float(x), False, [{"bits": x, "y": y}], [], []) for i, (x, y) in enumerate(points)]
    found = frontier(items, lambda e: e.bits, lambda e: Spread.of([e.rows[0]["y"]]))
    kept = {points[int(item.label)] for item in found}
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert kept == undominated
