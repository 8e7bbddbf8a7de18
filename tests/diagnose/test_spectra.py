from __future__ import annotations

import pytest
import torch
from chain import Chain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensormix.diagnose.spectra import Spectra, fit_power_law, mode_singular_values
from zoo import make


def orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(made).Q


def powers(num: int, exponent: float) -> Tensor:
    return torch.arange(1, num + 1, dtype=torch.float64) ** -exponent


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 2), st.floats(1e-3, 1e3), st.integers(8, 60))
def test_a_power_law_is_found_and_its_quality_is_perfect(exponent: float, scale: float, num: int) -> None:
    fit = fit_power_law(scale * powers(num, exponent), 0.1, 0.9)
    assert fit is not None and fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.scale == pytest.approx(scale) and fit.r_squared == pytest.approx(1)
    assert (fit.first, fit.last) == (int(0.1 * num) + 1, max(int(0.9 * num), int(0.1 * num) + 3))


def test_the_range_decides_where_the_law_changes() -> None:
    """The first half falls with 0.1, the second with 1: each range sees its own, both together see neither."""
    first, second = powers(50, 0.1), powers(100, 1.0)[50:]
    values = torch.cat([first, second * first[-1] / second[0]])
    head, tail, whole = (fit_power_law(values, *span) for span in ((0, 0.5), (0.5, 1), (0, 1)))
    assert head is not None and tail is not None and whole is not None
    assert head.exponent == pytest.approx(0.1) and tail.exponent == pytest.approx(1.0)
    assert 0.1 < whole.exponent < 1 and whole.r_squared < 0.95 < head.r_squared


def test_zero_values_are_no_part_of_the_fit() -> None:
    values = torch.cat([powers(6, 0.7), torch.zeros(10, dtype=torch.float64)])
    fit = fit_power_law(values, 0, 1)
    assert fit is not None and fit.last == 6 and fit.exponent == pytest.approx(0.7)
    assert fit_power_law(torch.tensor([1.0, 0.5, 0, 0, 0, 0]), 0, 1) is None
    assert fit_power_law(torch.zeros(9), 0, 1) is None


def test_unfoldings_of_a_stack_with_a_known_spectrum_in_each_mode() -> None:
    """X[e] = c_e U diag(s) V^T: the expert mode has one singular value, the others fall like s.
    Orthonormal experts scaled by c_e: the expert mode falls like c."""
    shared = orthogonal(12, 7, 0) * powers(7, 0.4) @ orthogonal(9, 7, 1).T
    factors = torch.tensor([1.0, 2.0, -0.5, 0.1], dtype=torch.float64)
    found = mode_singular_values(factors[:, None, None] * shared)
    torch.testing.assert_close(found["output"][:7], factors.norm() * powers(7, 0.4))
    torch.testing.assert_close(found["input"][:7], factors.norm() * powers(7, 0.4))
    assert found["expert"][0] == pytest.approx(float(factors.norm() * powers(7, 0.4).norm()))
    assert float(found["expert"][1:].max()) < 1e-6
    apart = (powers(5, 0.05)[:, None] * orthogonal(20, 5, 2).T).reshape(5, 4, 5)
    torch.testing.assert_close(mode_singular_values(apart)["expert"], powers(5, 0.05))


def test_rows_of_models() -> None:
    model = Chain(3, width=16)
    with torch.no_grad():
        planted = orthogonal(16, 16, 3) * powers(16, 0.3) @ orthogonal(16, 16, 4).T
        model.get_parameter("layers.1.down_proj.weight").copy_(planted)
    rows = Spectra(stop=1.0)(model)
    assert [row["block"] for row in rows] == [0, 1, 2] and all(row["mode"] == "weight" for row in rows)
    assert [row["exponent"] for row in rows] == pytest.approx([0, 0.3, 0], abs=1e-4)
    assert rows[1]["r_squared"] > 0.9999 and (rows[1]["first"], rows[1]["last"], rows[1]["num_values"]) == (1, 16, 16)
    assert Spectra(blocks=(1,), stop=1.0)(model) == rows[1:2]
    experts = [row for row in Spectra(stop=1.0)(make("qwen3_moe")) if "experts" in row["site"]]
    assert {(row["role"], row["mode"]) for row in experts} == {
        (role, mode) for role in ("gate_up", "down") for mode in ("expert", "output", "input")
    }
