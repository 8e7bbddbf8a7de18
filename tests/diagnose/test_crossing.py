from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.diagnose.crossing import fit_crossing


@settings(deadline=None, max_examples=40)
@given(st.floats(2.0, 14.0), st.floats(-0.02, 0.02), st.sampled_from([-0.03, 0.01, 0.02]))
def test_two_lines_are_found_exactly(joint: float, slope: float, turn: float) -> None:
    depths = np.arange(17.0)
    values = 0.1 + slope * depths + turn * np.maximum(depths - joint, 0)
    fit = fit_crossing(depths.tolist(), values.tolist())
    assert fit.depth == pytest.approx(joint, abs=1e-6)
    assert fit.slope_before == pytest.approx(slope, abs=1e-9)
    assert fit.slope_after == pytest.approx(slope + turn, abs=1e-9)
    assert fit.value == pytest.approx(0.1 + slope * joint, abs=1e-7)


def test_no_joint_on_a_fine_grid_is_better() -> None:
    generator = np.random.default_rng(3)
    depths = np.array([0.0, 1, 2, 4, 7, 8, 11, 12])
    for _ in range(20):
        values = np.cumsum(generator.random(8))
        best = min(
            float(np.linalg.lstsq(np.stack([depths**0, depths, np.maximum(depths - j, 0)], 1), values)[1].sum())
            for j in np.linspace(1, 11, 2001)
        )
        assert fit_crossing(depths.tolist(), values.tolist()).residual <= best + 1e-12


def test_the_slopes_of_the_paper_are_recovered() -> None:
    depths = list(range(0, 33))
    values = [0.006 * min(d, 17) + 0.016 * max(d - 17, 0) for d in depths]
    shuffled = sorted(depths, key=lambda d: (d * 7) % 33)
    fit = fit_crossing(shuffled, [values[d] for d in shuffled])
    assert (fit.depth, fit.slope_before, fit.slope_after) == pytest.approx((17, 0.006, 0.016))
    assert fit.row()["kind"] == "drift_crossing" and fit.row()["value"] == fit.depth


def test_a_straight_line_has_one_slope() -> None:
    fit = fit_crossing([0, 1, 2, 3, 4], [0.0, 0.5, 1.0, 1.5, 2.0])
    assert fit.slope_before == pytest.approx(fit.slope_after)


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least 4 depths with a value each, got 3 and 3"):
        fit_crossing([0, 1, 2], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="every depth must be there once"):
        fit_crossing([0, 1, 1, 2], [0.0, 1.0, 1.0, 2.0])
