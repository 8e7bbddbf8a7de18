"""docs/siblings.md is what its script makes of the measured rows, and its verdict follows them."""

from __future__ import annotations

import fused_page as script
import pytest


def test_the_page_is_made_of_the_rows():
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


def test_a_slower_product_is_told():
    rows = [row for row in script.newest() if row["kind"] == "siblings"]
    slow = [{**row, "median_ms": 2 * row["median_ms"]} if row["layer"] == "together" else row for row in rows]
    found, halved = ranges(script.verdict(rows)), ranges(script.verdict(slow))
    assert len(found) == 5
    assert [2 * value for pair in halved for value in pair] == pytest.approx(
        [value for pair in found for value in pair], abs=0.02
    )


def ranges(verdict):
    """The two numbers of every line."""
    return [[float(word) for word in line.split(": ")[1].split()[:3:2]] for line in verdict.splitlines()]


def test_no_row_was_disturbed():
    assert all(row["others_cpu"] <= 0.25 for row in script.newest() if "others_cpu" in row)
