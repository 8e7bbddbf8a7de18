"""docs/benchmarks.md says what its rows say, and the rows fit together."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_rows as page_maker
import pytest

from tensormix.evaluate.choices import wilson

ROOT = Path(__file__).parents[1]
ROWS = [
    json.loads(line) for line in (ROOT / "benchmarks/results/stories260k_benchmarks.jsonl").read_text().splitlines()
]
WHOLE = {row["task"]: row for row in ROWS if row["kind"] == "accuracy" and row["subject"] == "all"}


def test_the_table_is_that_of_the_rows() -> None:
    assert page_maker.table(ROWS) in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


def test_every_question_is_answered_or_named() -> None:
    out = {row["task"]: row for row in ROWS if row["kind"] == "left_out"}
    for task, row in WHOLE.items():
        assert row["num_questions"] + out.get(task, {"value": 0})["value"] == row["size"], task
        assert sum(row["gold"].values()) == sum(row["predicted"].values()) == row["num_questions"]
        right = round(row["value"] * row["num_questions"])
        assert (row["low"], row["high"]) == pytest.approx(wilson(right, row["num_questions"]))
    assert WHOLE["mmlu"]["size"] == 14042 and len(set(out["mmlu"]["ids"])) == out["mmlu"]["value"]
    subjects = [row for row in ROWS if row["kind"] == "accuracy" and row["task"] == "mmlu" and row["subject"] != "all"]
    assert len(subjects) == 57 and sum(row["num_questions"] for row in subjects) == WHOLE["mmlu"]["num_questions"]
    right = sum(row["value"] * row["num_questions"] for row in subjects)
    assert right == pytest.approx(WHOLE["mmlu"]["value"] * WHOLE["mmlu"]["num_questions"])


@pytest.mark.parametrize("task", ["mmlu", "piqa", "winogrande"])
def test_a_model_that_knows_nothing_is_at_chance(task: str) -> None:
    row = WHOLE[task]
    for chance in (row["blind"], 1 / len(row["gold"])):
        assert row["low"] < chance < row["high"]
    assert row["high"] - row["low"] < {"mmlu": 0.016}.get(task, 0.06)


def test_what_blind_answers_score() -> None:
    """The mean over all ways of dealing the answers to the questions."""
    from itertools import permutations
    from statistics import fmean

    predicted, gold = [0, 0, 1, 2], [0, 1, 1, 3]
    answers = [{"predicted": p, "gold": g} for p, g in zip(predicted, gold, strict=True)]
    dealt = fmean(fmean(p == g for p, g in zip(order, gold, strict=True)) for order in permutations(predicted))
    assert page_maker.blind(answers) == pytest.approx(dealt)


@pytest.mark.parametrize(
    ("file", "size", "share"),
    [("openbookqa_test", 500, 15.4), ("arc_challenge_test", 1172, 19.8), ("hellaswag_val1000", 1000, 27.4)],
)
def test_how_often_the_shortest_choice_is_right_is_what_the_page_says(file: str, size: int, share: float) -> None:
    path = Path(__file__).parents[2] / "shared" / "data" / "bench" / f"{file}.jsonl"
    if not path.exists():
        pytest.skip("no ../shared/data/bench beside the repository")
    right = 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        asked = json.loads(line)
        lengths = [len(choice) for choice in asked["choices"]]
        shortest = [number for number, length in enumerate(lengths) if length == min(lengths)]
        right += (asked["gold"] in shortest) / len(shortest)  # of several shortest ones any is taken
    assert 100 * right / size == pytest.approx(share, abs=0.05)
    assert f"{share} %" in (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
