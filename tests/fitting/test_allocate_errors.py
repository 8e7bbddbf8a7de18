"""What cannot be allocated is said in one sentence."""

from __future__ import annotations

from math import inf, nan

import pytest

from tensormix.fitting.divide import (
    Option,
    SiteOptions,
    budget_of,
    by_sensitivity,
    by_spectrum,
    iprs,
    low_rank,
    measured,
    uniform,
)

# Errors


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ({4: (8, 1.0), 8: (16, nan)}, "the error of size 8 must be finite, got nan"),
        ({4: (8, inf)}, "the error of size 4 must be finite, got inf"),
        ({4: (8, 1.0), 8: (16, 1.5)}, r"errors must not, but Option\(size=8, .*1.5\) follows Option\(size=4"),
        ({4: (8, 1.0), 8: (8, 0.5)}, r"costs must rise and errors must not, but Option\(size=8, .*0.5\) follows"),
        ({4: (33, 1.0)}, "the cost of size 4 must be a whole number up to the dense cost of 32, got 33"),
        ({4: (8.5, 1.0)}, r"the cost of size 4 must be a whole number up to the dense cost of 32, got 8\.5"),
        ({4: (-1, 1.0)}, "the cost of size 4 must be a whole number up to the dense cost of 32, got -1"),
        ({}, r"no option reaches the floor of 0\.0, the dearest keeps 0\.0000; set excluded to leave the site dense"),
    ],
)
def test_what_is_wrong_with_a_site_names_it(points, sentence):
    with pytest.raises(ValueError, match=f"^mlp: .*{sentence}"):
        measured("mlp", 32, points)


def test_options_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="mlp: costs must rise"):
        SiteOptions("mlp", 32, (Option(8, 16, 0.5), Option(4, 8, 1.0)))


@pytest.mark.parametrize("dense_cost", [0, -4, 2.5])
def test_the_dense_cost_is_a_whole_number(dense_cost):
    with pytest.raises(ValueError, match=f"mlp: the cost of size None must be a whole number .*, got {dense_cost}"):
        SiteOptions("mlp", dense_cost, excluded=True)


@pytest.mark.parametrize("spectrum", [[1.0, 2.0], [1.0, -0.5], [nan], [inf, 1.0]])
def test_a_spectrum_must_be_one(spectrum):
    with pytest.raises(ValueError, match="q: singular values must be finite, not negative, and from the largest on"):
        low_rank("q", spectrum, 8, 8, relative=True)


@pytest.mark.parametrize("granularity", [0, -2, 5])
def test_granularity_must_leave_a_rank(granularity):
    sentence = f"q: rank 4 is the largest that pays in a 8x8 layer, granularity must be .*, got {granularity}; or excl"
    with pytest.raises(ValueError, match=sentence):
        low_rank("q", [1.0], 8, 8, relative=True, granularity=granularity)


def test_nothing_to_allocate():
    for call in (lambda sites: by_spectrum(sites, 1), lambda sites: uniform(sites, 0.5), lambda s: budget_of(s, 0.5)):
        with pytest.raises(ValueError, match="there is nothing to allocate: no sites given"):
            call([])
        with pytest.raises(ValueError, match="there is nothing to allocate: every site is excluded"):
            call([SiteOptions("a", 4, excluded=True)])
    with pytest.raises(ValueError, match="importance is empty"):
        iprs({}, 0.5)


def test_a_site_that_is_there_twice():
    site = measured("a", 4, {1: (1, 1.0)})
    with pytest.raises(ValueError, match="every site must be there once, but a is there more often"):
        by_spectrum([site, site], 4)


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, 50, nan])
def test_keep_is_a_fraction(keep):
    site = measured("a", 4, {1: (1, 1.0)})
    for call in (lambda: budget_of([site], keep), lambda: uniform([site], keep), lambda: iprs({0: 1.0}, keep)):
        with pytest.raises(ValueError, match=f"keep is the fraction .* above 0 and at most 1, got {keep}"):
            call()


def test_importance_must_be_complete_and_positive():
    sites = [measured(name, 4, {1: (1, 1.0)}) for name in "ab"]
    with pytest.raises(ValueError, match="must name every site and nothing else; the first that differs is 'b'"):
        by_sensitivity(sites, 4, {"a": 1.0})
    with pytest.raises(ValueError, match="must name every site and nothing else; the first that differs is 'x'"):
        by_sensitivity(sites, 4, {"a": 1.0, "b": 1.0, "x": 1.0})
    for wrong in (0.0, -1.0, nan, inf):
        with pytest.raises(ValueError, match=f"importance must be positive and finite, got {wrong} for 'b'"):
            by_sensitivity(sites, 4, {"a": 1.0, "b": wrong})
        with pytest.raises(ValueError, match=f"importance must be positive and finite, got {wrong} for 1"):
            iprs({0: 1.0, 1: wrong}, 0.5)
