"""The table of docs/comparison.md is the one of the rows."""

import json
from pathlib import Path

import comparison_rows

ROOT = Path(__file__).parents[1]


def test_the_table_is_made_of_the_rows():
    file = ROOT / "benchmarks" / "results" / "stories260k_comparison.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    page = [line for line in (ROOT / "docs" / "comparison.md").read_text().splitlines() if line.startswith("|")]
    page = page[next(index for index, line in enumerate(page) if line.startswith("| method |")) :]
    made = comparison_rows.table(rows).splitlines()[2:]  # the page has a head of its own
    assert page[2 : 2 + len(made)] == made
    assert len({row["cell"] for row in rows}) == len(rows)
