"""Errors in units of what was expected."""

from __future__ import annotations


def assert_relative(actual, expected, tolerance, what):
    """Raise if the relative error exceeds `tolerance`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = float(((actual - expected).norm() / expected.norm().clamp_min(1e-30)).detach())
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"
