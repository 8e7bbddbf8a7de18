from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.diagnose.entropy import (
    entropy_rows,
    output_entropy,
    prediction_entropy,
    spread,
)
from tensormix.report.tradeoffs import TRENDS

LOGITS = st.lists(st.floats(-50, 50), min_size=4, max_size=4)


def answer(logits: list[float], predicted: int = 0) -> dict[str, Any]:
    return {"kind": "answer", "id": "q", "logits": logits, "predicted": predicted}


def test_known_distributions() -> None:
    flat, sure = answer([3.0, 3.0, 3.0, 3.0]), answer([1000.0, 0.0, 0.0, 0.0])
    pair = answer([7.0, 7.0, -2000.0, -2000.0])
    skewed = answer([math.log(p) + 5 for p in (0.5, 0.25, 0.125, 0.125)])
    assert output_entropy([flat]) == pytest.approx(1)
    assert output_entropy([sure]) == 0
    assert output_entropy([pair]) == pytest.approx(1 / 2)
    assert output_entropy([skewed]) == pytest.approx(1.75 / 2)  # bits over two bits
    assert output_entropy([flat, sure, pair]) == pytest.approx(1 / 2)  # mean over questions


def test_prediction_entropy_of_known_label_counts() -> None:
    def labels(*counts: int) -> list[dict[str, Any]]:
        return [answer([0.0] * 4, label) for label, count in enumerate(counts) for _ in range(count)]

    assert prediction_entropy(labels(5, 5, 5, 5)) == pytest.approx(1)
    assert prediction_entropy(labels(0, 0, 9, 0)) == 0 and str(prediction_entropy(labels(9))) == "0.0"
    assert prediction_entropy(labels(3, 0, 0, 3)) == pytest.approx(1 / 2)
    assert prediction_entropy(labels(8, 4, 2, 2)) == pytest.approx(1.75 / 2)


@settings(deadline=None, max_examples=50)
@given(st.lists(LOGITS, min_size=1, max_size=6), st.floats(-100, 100))
def test_output_entropy_is_a_fraction_that_ignores_a_common_shift(questions: list[list[float]], shift: float) -> None:
    value = output_entropy([answer(logits) for logits in questions])
    assert 0 <= value <= 1 + 1e-12
    moved = [answer([logit + shift for logit in reversed(logits)]) for logits in reversed(questions)]
    assert output_entropy(moved) == pytest.approx(value, abs=1e-9)


def test_published_trends() -> None:
    trends = {key: trend(0.46) for key, _, trend, _ in TRENDS}
    assert trends == pytest.approx({"output_entropy": 0.602, "spread": 1.3402})
    assert spread(0.99) == pytest.approx(2) and spread(1.0) == math.inf


def test_rows() -> None:
    rows = entropy_rows([answer([0.0] * 4, 0), answer([0.0] * 4, 1)])
    assert rows == [
        {"kind": "output_entropy", "value": pytest.approx(1)},
        {"kind": "prediction_entropy", "value": pytest.approx(1 / 2)},
    ]


def test_errors() -> None:
    with pytest.raises(ValueError, match="there are no answers"):
        prediction_entropy([])
    with pytest.raises(ValueError, match="question 'q' needs four finite logits"):
        output_entropy([answer([0.0, math.nan, 0.0, 0.0])])
    with pytest.raises(ValueError, match="needs four finite logits"):
        output_entropy([answer([0.0, 1.0])])
