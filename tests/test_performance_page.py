"""docs/performance.md is what its script makes of the measured rows, and says what was missed and what is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import performance_page
    finally:
        sys.path.remove(str(BENCHMARKS))
    return performance_page


def test_the_page_is_made_of_the_rows(script):
    rows = script.newest(script.ROWS.read_text(encoding="utf-8").splitlines())
    assert script.PAGE.read_text(encoding="utf-8") == script.page(rows)


def test_a_newer_row_replaces_an_older_one_and_a_missed_target_is_told(script):
    lines = script.ROWS.read_text(encoding="utf-8").splitlines()
    row = next(
        row
        for row in map(json.loads, lines)
        if row["kind"] == "layer" and row["layer"] == "mixt" and (row["pass"], row["tokens"]) == ("forward", 128)
    )
    fast, slow = (json.dumps({**row, "speedup": speedup}) for speedup in (1.9, 1.7))
    newest = script.newest([*lines, fast, slow])
    assert len(newest) == len(script.newest(lines))
    for newer, verdict in ((fast, "| 1.900 | met |"), (slow, "| 1.700 | **missed** |")):
        assert verdict in script.page(script.newest([*lines, newer]))


def test_what_was_not_measured_is_named(script):
    lines = script.ROWS.read_text(encoding="utf-8").splitlines()
    left = [line for line in lines if (row := json.loads(line))["kind"] != "layer" or row["in_features"] != 11008]
    assert "LLaMA-2-7B 11008 -> 4096 at 1, 8, 128, 1024, 4096 tokens" in script.page(script.newest(left))
