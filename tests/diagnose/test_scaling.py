from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.diagnose.scaling import fit_trend, scaling_rows

SIZES = (0.6e9, 1.7e9, 4e9, 8e9, 14e9)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 2), st.floats(0.5, 4), st.floats(0.05, 1))
def test_a_trend_of_known_exponent_is_found(floor: float, share: float, exponent: float) -> None:
    scale = share * SIZES[0] ** exponent
    losses = [floor + scale * size**-exponent for size in SIZES]
    trend = fit_trend(SIZES, losses)
    assert [trend(size) for size in SIZES] == pytest.approx(losses, abs=2e-4)
    assert trend.exponent == pytest.approx(exponent, abs=0.02) and trend.floor == pytest.approx(floor, abs=0.15)
    assert trend.residual < 2e-4 and trend.floor >= 0


def test_two_models_fix_a_power_law() -> None:
    trend = fit_trend([1e6, 16e6], [4.0, 1.0])
    assert trend.exponent == pytest.approx(0.5) and trend.floor == 0 and trend(4e6) == pytest.approx(2.0)


def test_descendants_below_the_trend_have_negative_residuals() -> None:
    dense = [{"model": f"m{i}", "parameters": size, "loss": 1.5 + 900 * size**-0.35} for i, size in enumerate(SIZES)]
    better = {"model": "last-04-mixt4", "parameters": 7e9, "loss": 1.5 + 900 * 7e9**-0.35 - 0.05, "depth": 4}
    rows = scaling_rows(dense, [better, {**better, "model": "worse", "loss": better["loss"] + 0.15}])
    assert [row["kind"] for row in rows] == ["scaling_trend", *["scaling"] * 7] and rows[0]["num_models"] == 5
    assert [row["residual"] for row in rows[1:6]] == pytest.approx([0] * 5, abs=1e-4)
    assert [row["residual"] for row in rows[6:]] == pytest.approx([-0.05, 0.1], abs=1e-3)
    assert rows[6]["family"] == "compressed" and rows[6]["depth"] == 4 and rows[1]["family"] == "dense"
    assert all(row["loss"] == pytest.approx(row["expected"] + row["residual"]) for row in rows[1:])


def test_errors() -> None:
    with pytest.raises(ValueError, match="a trend needs at least 2 dense models with a loss each, got 1"):
        fit_trend([1e6], [2.0])
    for sizes, losses in (([1e6, 1e6], [2.0, 3.0]), ([1e6, 2e6], [2.0, -3.0]), ([1e6, 2e6], [2.0, float("nan")])):
        with pytest.raises(ValueError, match="dense models must differ in size, and sizes and losses must be positive"):
            fit_trend(sizes, losses)
