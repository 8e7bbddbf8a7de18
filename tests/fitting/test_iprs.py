"""Importance to shares of a budget: by hand, and what holds for all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.fitting.divide import iprs


def test_iprs_by_hand():
    """At 0.6 of 5 blocks, 3 in shares of 4 4 1 1 2, the first two get 1 exactly; at 0.7 they are cut to it."""
    blocks = dict(zip("abcde", (4, 4, 1, 1, 2), strict=True))
    assert list(iprs(blocks, 0.6).values()) == pytest.approx([1, 1, 0.25, 0.25, 0.5])
    assert list(iprs(blocks, 0.7).values()) == pytest.approx([1, 1, 0.375, 0.375, 0.75])


def test_iprs_fixes_at_one_in_more_than_one_round():
    """Round 1 fixes the 100 only; what it leaves over lifts the 10, at 0.25 before, above 1."""
    weights = iprs({0: 100.0, 1: 10.0, 2: 1.0, 3: 1.0}, 0.75)
    assert weights == pytest.approx({0: 1, 1: 1, 2: 0.5, 3: 0.5})


@settings(deadline=None, max_examples=150)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.floats(0.01, 1))
def test_iprs_sums_to_the_budget_is_monotone_and_never_above_one(angles, keep):
    weights = list(iprs(dict(enumerate(angles)), keep).values())
    assert sum(weights) == pytest.approx(keep * len(angles), rel=1e-9)
    assert all(0 <= weight <= 1 for weight in weights)
    in_order = [weight for _, weight in sorted(zip(angles, weights, strict=True))]
    assert in_order == sorted(in_order)
    partial = [weight / angle for angle, weight in zip(angles, weights, strict=True) if weight < 1]
    assert not partial or max(partial) == pytest.approx(min(partial)), "below 1 all are one multiple of the importance"


def test_iprs_with_all_or_with_equal_blocks():
    assert iprs({0: 1.0, 1: 7.0, 2: 0.1}, 1.0) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert iprs({name: 3.0 for name in "abc"}, 0.4) == pytest.approx({name: 0.4 for name in "abc"})
