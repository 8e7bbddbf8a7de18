"""Budgets, floors and sites that stay dense; sites that matter more than others."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from site_options import FEW, any_budget, assert_maximal, cost_of, error_of, low_rank_sites, optima
from tensormix.fitting.divide import (
    Option,
    SiteOptions,
    budget_of,
    by_sensitivity,
    by_spectrum,
    low_rank,
    lower_bound,
    measured,
    uniform,
)
from tensormix.fitting.ranks import rank_for

# Budgets, floors and sites that stay dense


@FEW
@given(st.integers(1, 999), st.lists(st.tuples(st.integers(20, 90), st.integers(20, 90)), min_size=1, max_size=4))
def test_uniform_gives_every_layer_the_rank_that_the_methods_take(thousandths, shapes):
    keep = thousandths / 1000
    sites = [low_rank(f"s{i}", [1.0], *shape, relative=True) for i, shape in enumerate(shapes)]
    try:
        ranks = [rank_for("Svd", keep, *shape) for shape in shapes]
    except ValueError:
        with pytest.raises(ValueError, match=rf"keep={keep} is too little for s\d: the smallest possible is"):
            uniform(sites, keep)
        return
    chosen = uniform(sites, keep)
    assert [option.size for option in chosen.values()] == ranks
    assert 1000 * cost_of(chosen) <= thousandths * sum(site.dense_cost for site in sites)


@FEW
@given(st.data(), st.integers(1, 1000))
def test_uniform_counts_what_stays_dense(data, thousandths):
    costs = data.draw(st.lists(st.integers(10, 60), min_size=2, max_size=4))
    sites = [measured(f"s{i}", cost, {c: (c, -c) for c in range(cost + 1)}) for i, cost in enumerate(costs)]
    sites[0] = replace(sites[0], excluded=True)
    total, room = sum(costs), thousandths * sum(costs) - 1000 * costs[0]
    if room < 0:
        least = ceil(costs[0] / total * 1e4 - 1e-9) / 1e4
        with pytest.raises(ValueError, match=f"the smallest possible is {least}, the largest 1"):
            uniform(sites, thousandths / 1000)
        return
    chosen = uniform(sites, thousandths / 1000)
    assert chosen["s0"] == Option(None, costs[0], 0.0)
    share = (room, 1000 * (total - costs[0]))
    assert [o.size for o in chosen.values()][1:] == [cost * share[0] // share[1] for cost in costs[1:]]


def test_the_smallest_keep_that_uniform_names_is_usable_and_less_is_not():
    sites = [low_rank("wide", [1.0], 300, 40, relative=True), low_rank("tall", [1.0], 30, 70, relative=True)]
    with pytest.raises(ValueError, match=r"keep=0\.01 is too little for tall: the smallest possible is 0\.0477, the"):
        uniform(sites, 0.01)
    assert uniform(sites, 0.0477)["tall"].size == 1
    with pytest.raises(ValueError, match="too little"):
        uniform(sites, 0.0476)


def test_the_smallest_budget_that_is_named_is_usable_and_less_is_not():
    sites = [low_rank("a", [1.0], 300, 40, relative=True), low_rank("b", [1.0], 30, 70, relative=True)]
    named = r"a budget of 439 cannot be met: it must be from 440 \(keep=0\.0313\) to 14100 \(keep=1\)"
    with pytest.raises(ValueError, match=named):
        by_spectrum(sites, 439)
    with pytest.raises(ValueError, match=r"a budget of 14101 cannot be met: it must be from 440"):
        lower_bound(sites, 14101)
    assert [option.size for option in by_spectrum(sites, 440).values()] == [1, 1]
    assert budget_of(sites, 0.0312) == 439 and budget_of(sites, 0.0313) >= 440


def test_keep_is_not_lost_to_rounding():
    site = measured("site", 200, {1: (58, 1.0)})
    assert 0.29 * 200 < 58 and budget_of([site], 0.29) == 58
    assert uniform([site], 0.29) == {"site": Option(1, 58, 1.0)}
    assert replace(site, floor=0.29).allowed == site.options
    thirds = [measured("site", 3 * 10**12, {1: (10**12, 1.0)})]
    assert budget_of(thirds, 1 / 3) == 10**12


def test_a_floor_is_kept_whatever_the_gain():
    sites = [low_rank("a", [9.0, 8.0, 7.0, 6.0], 8, 8, relative=False), low_rank("b", [1.0], 8, 8, relative=False)]
    assert [o.size for o in by_spectrum(sites, 80).values()] == [4, 1]
    sites[1] = replace(sites[1], floor=0.6)  # 38.4 of 64: rank 3
    assert [o.size for o in by_spectrum(sites, 80).values()] == [2, 3]
    assert [o.size for o in uniform(sites, 0.75).values()] == [3, 3]
    with pytest.raises(ValueError, match=r"keep=0\.5 is too little for b: the smallest possible is 0\.75"):
        uniform(sites, 0.5)
    with pytest.raises(ValueError, match=r"b: no option reaches the floor of 0\.9, the dearest keeps 0\.5000; set exc"):
        SiteOptions("b", 64, (Option(2, 32, 1.0),), floor=0.9)


def test_an_excluded_site_is_dense_and_paid_for():
    sites = [low_rank(name, [3.0, 2.0, 1.0], 8, 8, relative=True) for name in "ab"]
    sites.insert(1, SiteOptions("kept", 64, excluded=True))
    budget = budget_of(sites, 0.5)
    assert budget == 96
    chosen = by_spectrum(sites, budget)
    assert chosen["kept"] == Option(None, 64, 0.0)
    assert [chosen[name].size for name in "ab"] == [1, 1]
    assert by_sensitivity(sites, budget, {"a": 2.0, "kept": 2.0, "b": 2.0})["kept"] == Option(None, 64, 0.0)


# Importance


@FEW
@given(st.data(), low_rank_sites(), st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_sensitivity_minimises_the_weighted_errors(data, sites, weights):
    budget = data.draw(any_budget(sites))
    importance = {site.name: float(weight) for site, weight in zip(sites, weights, strict=False)}
    heavy = [
        replace(site, options=tuple(Option(o.size, o.cost, o.error * importance[site.name]) for o in site.options))
        for site in sites
    ]
    chosen = by_sensitivity(sites, budget, importance)
    assert error_of(chosen) == pytest.approx(optima(heavy, budget)[-1], abs=1e-9)
    assert_maximal(heavy, chosen, budget)


@FEW
@given(st.data(), low_rank_sites())
def test_a_site_that_matters_more_gets_no_less(data, sites):
    budget = data.draw(any_budget(sites))
    importance = {site.name: 1.0 for site in sites}
    before = by_spectrum(sites, budget)
    assert by_sensitivity(sites, budget, importance) == before
    name = data.draw(st.sampled_from(sorted(importance)))
    after = by_sensitivity(sites, budget, importance | {name: 5.0})
    assert after[name].cost >= before[name].cost
