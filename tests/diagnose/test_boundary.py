from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.diagnose.boundary import Boundary, Measurement, _falls, _resample, _residuals, find_boundary

DEPTHS = np.arange(17)
STEP = np.where(DEPTHS < 9, 0.6, 0.28)
RAMP = np.clip(0.6 - 0.1 * np.maximum(DEPTHS - 8, 0), 0.25, 0.6)  # 0.5 at depth 9
SLUMP = np.where(DEPTHS < 9, 0.6 - 0.002 * DEPTHS, np.where(DEPTHS == 9, 0.45, 0.27))
AT_ONCE = np.where(DEPTHS < 1, 0.6, 0.27)
LAST = np.where(DEPTHS < 16, 0.6, 0.3)


def measured(accuracies: np.ndarray, num_questions: int = 600, depths: np.ndarray = DEPTHS) -> list[Measurement]:
    return [
        Measurement(depth=int(depth), accuracy=float(accuracy), num_questions=num_questions)
        for depth, accuracy in zip(depths, accuracies, strict=True)
    ]


def noisy(fractions: np.ndarray, seed: int, num_questions: int = 600) -> list[Measurement]:
    drawn = np.random.default_rng(seed).binomial(num_questions, fractions) / num_questions
    return measured(drawn, num_questions)


def find(measurements: list[Measurement]) -> Boundary:
    return find_boundary(measurements, num_resamples=100)


@pytest.mark.parametrize(
    ("curve", "planted"),
    [(STEP, 9), (RAMP, 9), (SLUMP, 9), (AT_ONCE, 1), (LAST, 16)],
    ids="step ramp slump one 16".split(),
)
@pytest.mark.parametrize("num_questions", [200, 600])
def test_a_planted_boundary_is_found_and_covered(curve: np.ndarray, planted: int, num_questions: int) -> None:
    found = [find(noisy(curve, seed, num_questions)) for seed in range(60)]
    values = [boundary.value for boundary in found]
    assert all(value is not None and abs(value - planted) <= 1 for value in values)
    covered = [
        boundary.low is not None and boundary.low <= planted <= (17 if boundary.high is None else boundary.high)
        for boundary in found
    ]
    # 95 % are stated; 60 draws of a 95 % interval hold fewer than 52 with a probability below 1 %
    assert sum(covered) >= 52
    if num_questions == 600:
        assert values.count(planted) >= 57


def test_without_noise_the_numbers_are_exact() -> None:
    boundary = find(measured(STEP, 2000))
    assert (boundary.value, boundary.last_good, boundary.low, boundary.high) == (9, 8, 9, 9)
    assert boundary.plateau == pytest.approx(0.6) and boundary.level == pytest.approx(0.28)
    assert boundary.plateau_spread == pytest.approx((0.6 * 0.4 / 2000) ** 0.5, rel=1e-3)  # the binomial noise
    assert boundary.sentence == (
        "accuracy leaves its plateau of 0.600 at depth 9 and stays below it: 0.280 on average from there on"
    )


def test_flat_curves_have_no_boundary() -> None:
    found = [find(noisy(np.full(17, 0.5), seed)) for seed in range(100)]
    assert sum(boundary.value is not None for boundary in found) <= 2
    quiet = find(measured(np.full(17, 0.5)))
    assert (quiet.value, quiet.low, quiet.high, quiet.level) == (None, None, None, None)
    assert quiet.sentence == "accuracy does not leave its plateau of 0.500 for good up to depth 16"
    assert quiet.share_without > 0.95


def test_growing_accuracy_is_not_leaving() -> None:
    assert find(measured(np.linspace(0.3, 0.6, 17))).value is None


@pytest.mark.parametrize("dip", [1, 5, 15])
def test_a_dip_that_comes_back_does_not_count(dip: int) -> None:
    curve = np.full(17, 0.6)
    curve[dip] = 0.3
    boundary = find(measured(curve))
    assert boundary.value is None
    assert f"it dips at depth {dip} but comes back" in boundary.sentence
    curve[12:] = 0.27
    if dip < 12:
        assert find(measured(curve)).value == 12


def test_v_shape_is_no_boundary() -> None:
    assert find(measured(0.3 + 0.3 * np.abs(DEPTHS - 8) / 8)).value is None


def test_a_wider_plateau_than_the_questions_explain() -> None:
    """Checkpoints that scatter by more than binomial noise: the spread says so, and the same drop is less certain."""
    scatter = 0.03 * np.where(DEPTHS % 2, 1, -1)
    calm, rough = find(measured(STEP, 20_000)), find(measured(np.where(DEPTHS < 9, STEP + scatter, STEP), 20_000))
    assert rough.value == calm.value == 9
    assert calm.plateau_spread < 0.005 < 0.03 <= rough.plateau_spread < 0.04
    # a last checkpoint 0.04 lower leaves a calm plateau and not a rough one
    low = np.full(17, 0.6)
    low[16] -= 0.04
    assert find(measured(low, 20_000)).value == 16
    assert find(measured(np.where(DEPTHS < 16, low + scatter, low), 20_000)).value is None


def test_gaps_are_reported_as_a_bracket() -> None:
    depths = np.array([0, 4, 8, 12, 16])
    boundary = find(measured(np.array([0.6, 0.59, 0.6, 0.3, 0.27]), depths=depths))
    assert (boundary.last_good, boundary.value) == (8, 12)
    assert boundary.low == 9 and boundary.high == 12
    assert "at depth 12 (depths 9 to 11 were not scanned)" in boundary.sentence


def test_an_open_end() -> None:
    """A last checkpoint that barely leaves the plateau: some resamples do not, and the interval has no upper end."""
    curve = np.full(17, 0.6)
    curve[16] = 0.52
    boundary = find_boundary(measured(curve), num_resamples=400)
    assert boundary.value == 16 and boundary.high is None and 0.05 < boundary.share_without < 0.95


def test_the_seed_decides_and_the_order_does_not() -> None:
    points = noisy(RAMP, 3, 200)
    assert find(points) == find(points[::-1])
    assert find(points).value == find_boundary(points, num_resamples=100, seed=5).value


def test_a_wider_confidence_gives_a_wider_interval() -> None:
    points = noisy(RAMP, 3, 200)
    narrow, wide = (find_boundary(points, confidence=level) for level in (0.5, 0.99))
    assert None not in (narrow.low, narrow.high, wide.low, wide.high)
    assert wide.low <= narrow.low <= narrow.high <= wide.high and (wide.low, wide.high) != (narrow.low, narrow.high)  # type: ignore[operator]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=12),
    st.lists(st.integers(1, 5), min_size=12, max_size=12),
    st.integers(1, 500),
)
def test_any_sweep_has_a_consistent_answer(accuracies: list[float], steps: list[int], num_questions: int) -> None:
    depths = np.cumsum([0, *steps])[: len(accuracies)]
    boundary = find_boundary(measured(np.array(accuracies), num_questions, depths), num_resamples=20)
    if boundary.value is None:
        assert boundary.last_good == depths[-1]
        return
    place = depths.tolist().index(boundary.value)
    assert depths[place - 1] == boundary.last_good and boundary.low is not None
    assert boundary.low <= boundary.value <= (boundary.high or depths[-1])
    assert all(accuracy < boundary.plateau for accuracy in accuracies[place:])


def test_row() -> None:
    row = find(measured(STEP)).row(method="mixt", direction="last")
    assert row["kind"] == "boundary" and row["method"] == "mixt" and row["value"] == 9
    assert {"low", "high", "last_good", "plateau", "sentence"} <= row.keys()


def test_errors() -> None:
    good = measured(STEP)
    with pytest.raises(ValueError, match="at least 2 measurements, got 1; give the dense model as depth 0"):
        find_boundary(good[:1])
    with pytest.raises(ValueError, match="depth 3 was given twice"):
        find_boundary([*good, good[3]])
    with pytest.raises(ValueError, match=r"depth 0 has accuracy 61\.0 on 100 questions; an accuracy is a fraction"):
        find_boundary([Measurement(depth=0, accuracy=61.0, num_questions=100), good[3]])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        find_boundary(good, confidence=95)


def test_shapes_of_the_fit() -> None:
    shapes, starts = _falls(np.array([0.0, 1.0, 3.0, 4.0]))
    fallen = {(int(start), tuple(shape.tolist())) for start, shape in zip(starts, shapes.round(9), strict=True)}
    assert fallen == {
        (1, (0, 1, 1, 1)),  # a step
        (1, (0, round(1 / 3, 9), 1, 1)),  # a straight fall, then level
        (1, (0, 0.25, 0.75, 1)),  # falls to the end
        (2, (0, 0, 1, 1)),
        (2, (0, 0, round(2 / 3, 9), 1)),
        (3, (0, 0, 0, 1)),
    }


def test_the_fit_is_least_squares_weighted_by_the_binomial_variance() -> None:
    questions = np.array([50.0, 800.0, 200.0, 3000.0, 10.0])
    accuracies = np.array([[0.61, 0.58, 0.5, 0.3, 0.9], [0.2, 0.9, 0.4, 0.5, 0.1]])
    shapes, _ = _falls(np.arange(5.0))
    residuals = _residuals(shapes, accuracies, questions)
    for row, values in enumerate(accuracies):
        smooth = (values * questions + 2) / (questions + 4)
        root = np.sqrt(questions / (smooth * (1 - smooth)))
        for column, fallen in enumerate(shapes):
            design = np.stack([1 - fallen, fallen], axis=1) * root[:, None]
            best = np.linalg.lstsq(design, values * root)[0]
            assert residuals[row, column] == pytest.approx(((design @ best - values * root) ** 2).sum(), abs=1e-8)


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_resamples_scatter_like_the_questions_and_the_plateau(spread: float) -> None:
    binomial = (0.6 * 0.4 / 600) ** 0.5
    drawn = _resample(np.full(4, 0.6), np.full(4, 600.0), 0.6, max(spread, binomial), 2, 20_000, seed=0)
    assert drawn.mean() == pytest.approx(0.6, abs=1e-3)
    assert drawn.std() == pytest.approx(max(spread, binomial), rel=0.02)
