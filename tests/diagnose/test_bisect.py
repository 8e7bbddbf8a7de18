from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tensormix.diagnose.bisect import bisect_boundary
from tensormix.diagnose.boundary import Boundary, Measurement, find_boundary


def sweep(fractions: np.ndarray, seed: int, num_questions: int = 600) -> list[Measurement]:
    drawn = np.random.default_rng(seed).binomial(num_questions, fractions) / num_questions
    return [
        Measurement(depth=depth, accuracy=float(accuracy), num_questions=num_questions)
        for depth, accuracy in enumerate(drawn)
    ]


def replay(recorded: list[Measurement], calls: list[int]) -> Callable[[int], Measurement]:
    def measure(depth: int) -> Measurement:
        calls.append(depth)
        return recorded[depth]

    return measure


def search(recorded: list[Measurement]) -> tuple[Boundary, list[int]]:
    calls: list[int] = []
    return bisect_boundary(replay(recorded, calls), len(recorded) - 1, num_resamples=20), calls


@pytest.mark.parametrize("num_blocks", [8, 16, 32])
def test_agrees_with_the_full_scan_on_abrupt_sweeps(num_blocks: int) -> None:
    for boundary in range(1, num_blocks + 1):
        fractions = np.where(np.arange(num_blocks + 1) < boundary, 0.62, 0.27)
        recorded = sweep(fractions, seed=boundary)
        found, calls = search(recorded)
        assert found.value == find_boundary(recorded, num_resamples=20).value == boundary
        assert found.last_good == boundary - 1
        assert len(calls) == len(set(calls)) <= math.log2(num_blocks) + 5


def test_agrees_within_a_depth_on_gradual_sweeps() -> None:
    depths = np.arange(33)
    for seed in range(40):
        start = 5 + seed % 20
        recorded = sweep(np.clip(0.6 - 0.08 * np.maximum(depths - start + 1, 0), 0.26, 0.6), seed)
        found, calls = search(recorded)
        scan = find_boundary(recorded, num_resamples=20)
        assert found.value is not None and scan.value is not None and abs(found.value - scan.value) <= 1
        assert len(calls) <= 14


def test_halves_back_to_the_onset_of_a_long_fall() -> None:
    depths = np.arange(33)
    recorded = sweep(0.7 - 0.03 * np.maximum(depths - 19, 0), seed=0, num_questions=20_000)
    found, calls = search(recorded)
    assert found.value == find_boundary(recorded, num_resamples=20).value == 20
    assert len(calls) <= 13


def test_a_curve_that_never_leaves_takes_two_calls() -> None:
    found, calls = search(sweep(np.full(33, 0.6), seed=1))
    assert found.value is None and calls == [0, 32]


def test_one_block() -> None:
    found, calls = search(sweep(np.array([0.6, 0.25]), seed=0))
    assert found.value == 1 and calls == [0, 1]


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        bisect_boundary(lambda depth: Measurement(depth=depth, accuracy=0.5, num_questions=10), 0)
