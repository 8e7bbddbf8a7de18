"""Where marginal gains are optimal, by dynamic programming; and what the options are."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from math import inf

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from site_options import (
    DENSE,
    FEW,
    any_budget,
    any_sites,
    assert_maximal,
    cost_of,
    error_of,
    low_rank_sites,
    optima,
    smallest,
    squared,
)
from tensormix.fitting.divide import Option, SiteOptions, by_spectrum, low_rank, lower_bound, measured, uniform
from tensormix.methods import Rtn, SvdLlm
from tensormix.operators import LowRank
from tensormix.statistics import Gram


def hull_steps(site: SiteOptions, room: int) -> list[tuple[float, int]]:
    """Slope and cost of each step of the lower convex hull: a corner is an option below every chord that spans it."""
    in_reach = [o for o in site.allowed if o.cost <= site.allowed[0].cost + room]
    options = [o for o in in_reach if all(a.error > o.error for a in in_reach if a.cost < o.cost)]

    def below(o: Option, a: Option, b: Option) -> bool:
        return (o.error - a.error) * (b.cost - a.cost) <= (b.error - a.error) * (o.cost - a.cost)

    corners = [
        o for o in options if all(below(o, a, b) for a, b in product(options, options) if a.cost < o.cost < b.cost)
    ]
    return [((a.error - b.error) / (b.cost - a.cost), b.cost - a.cost) for a, b in pairwise(corners)]


@FEW
@given(st.data(), low_rank_sites(granularities=(1, 2)))
def test_equal_steps_of_convex_lists_are_allocated_optimally(data, sites):
    budget = data.draw(any_budget(sites))
    chosen, best = by_spectrum(sites, budget), optima(sites, budget)
    assert error_of(chosen) == pytest.approx(best[-1], abs=1e-9)
    assert_maximal(sites, chosen, budget)
    whole_steps = budget - (budget - smallest(sites)) % sites[0].options[0].cost
    assert lower_bound(sites, whole_steps) == pytest.approx(best[whole_steps], abs=1e-9), "nothing is taken in part"


@settings(deadline=None, max_examples=150)
@given(st.data(), st.one_of(any_sites(), low_rank_sites(((2, 3), (3, 3), (2, 7), (4, 4)))))
def test_whatever_the_lists_no_smaller_budget_by_a_step_does_better(data, sites):
    budget = data.draw(any_budget(sites))
    chosen, best = by_spectrum(sites, budget), optima(sites, budget)
    assert_maximal(sites, chosen, budget)
    room = budget - smallest(sites)
    step = max((cost for site in sites for _, cost in hull_steps(site, room)), default=0)
    spared = budget - max(step - 1, 0)  # costs are whole: everything below is a full step away
    assert best[-1] - 1e-9 <= error_of(chosen) <= (best[spared] if spared >= 0 else inf) + 1e-9
    assert lower_bound(sites, budget) <= best[-1] + 1e-9


@FEW
@given(st.data(), any_sites())
def test_where_a_step_of_the_hulls_ends_it_is_optimal(data, sites):
    """In falling order of their slopes, the first steps of all hulls together are the optimum of what they cost."""
    steps = sorted((step for site in sites for step in hull_steps(site, DENSE)), reverse=True)
    assume(len({slope for slope, _ in steps}) == len(steps))
    first = steps[: data.draw(st.integers(0, len(steps)))]
    budget = smallest(sites) + sum(cost for _, cost in first)
    error = sum(site.allowed[0].error for site in sites) - sum(slope * cost for slope, cost in first)
    chosen = by_spectrum(sites, budget)
    assert cost_of(chosen) == budget
    assert error_of(chosen) == pytest.approx(error, abs=1e-9) == optima(sites, budget)[-1]


def test_a_gain_that_comes_late_is_seen_early():
    """The first step of `late` alone gains less than those of `even`; both steps together gain more."""
    late = measured("late", 9, {0: (0, 10.0), 1: (1, 9.5), 2: (2, 0.0)})
    even = measured("even", 9, {0: (0, 4.0), 1: (1, 3.0), 2: (2, 2.0)})
    assert [option.size for option in by_spectrum([even, late], 2).values()] == [0, 2]
    assert [option.size for option in by_spectrum([even, late], 1).values()] == [1, 0]


def test_steps_of_different_costs_are_a_knapsack_and_the_bound_says_so():
    """Gain per cost takes the 3 first, and nothing fits into the 1 that is left; two times 2 would be better."""
    sites = [
        measured("a", 9, {"no": (0, 4.0), "yes": (3, 0.0)}),
        measured("b", 9, {"no": (0, 2.5), "yes": (2, 0.0)}),
        measured("c", 9, {"no": (0, 2.5), "yes": (2, 0.0)}),
    ]
    chosen = by_spectrum(sites, 4)
    assert [option.size for option in chosen.values()] == ["yes", "no", "no"]
    assert (error_of(chosen), optima(sites, 4)[-1]) == (5.0, 4.0)
    assert lower_bound(sites, 4) == pytest.approx(5.0 - 2.5 / 2)


def test_between_two_corners_of_the_hull_what_fits_is_taken():
    """The dense weight hides ranks with nearly flat spectra: the hull has two corners, and the second is too dear."""
    site = low_rank("flat", [1.0] * 10, 10, 10, relative=True, or_dense=True)
    assert [option.size for option in site.options] == [1, 2, 3, 4, None]
    assert by_spectrum([site], 99)["flat"] == (4, 80, pytest.approx(0.6))
    assert by_spectrum([site], 100)["flat"] == Option(None, 100, 0.0)
    twin = replace(site, name="twin")
    assert [option.size for option in by_spectrum([site, twin], 120).values()] == [None, 1]
    assert [option.size for option in by_spectrum([site, twin], 119).values()] == [4, 1], "19 left, a rank costs 20"


def test_options_that_gain_nothing_are_not_paid_for():
    sites = [low_rank("full", [1.0], 8, 8, relative=True), low_rank("zero", [], 8, 8, relative=True)]
    assert by_spectrum(sites, 128) == {"full": Option(1, 16, 0.0), "zero": Option(1, 16, 0.0)}


def test_of_equal_gains_the_first_site_is_served():
    sites = [low_rank(name, [3.0, 2.0, 1.0], 8, 8, relative=True) for name in "zab"]
    ranks = ["".join(str(o.size) for o in by_spectrum(sites, budget).values()) for budget in range(48, 128, 16)]
    assert ranks == ["111", "211", "221", "222", "322"]


@FEW
@given(st.data(), low_rank_sites(((2, 3), (3, 3), (2, 7), (4, 4))), st.integers(2, 64))
def test_the_unit_does_not_matter(data, sites, unit):
    budget = data.draw(any_budget(sites))
    other = [
        measured(site.name, site.dense_cost * unit, {o.size: (o.cost * unit, o.error) for o in site.options})
        for site in sites
    ]
    spare = min(unit - 1, sum(site.dense_cost for site in other) - budget * unit)
    ours, theirs = by_spectrum(sites, budget), by_spectrum(other, budget * unit + spare)
    assert {name: o.size for name, o in ours.items()} == {name: o.size for name, o in theirs.items()}


# What the options are


@pytest.mark.parametrize("granularity", [1, 3])
def test_errors_and_costs_of_low_rank_are_those_of_the_operator(granularity):
    torch.manual_seed(0)
    weight = torch.randn(14, 22, dtype=torch.float64)
    squares = float(weight.square().sum())
    spectrum = torch.linalg.svdvals(weight).tolist()
    wanted = {"cost_per_number": 64, "granularity": granularity}
    sites = {relative: low_rank("site", spectrum, 22, 14, relative=relative, **wanted) for relative in (False, True)}
    assert [option.size for option in sites[True].options] == list(range(granularity, 22 * 14 // 36 + 1, granularity))
    for absolute, share in zip(sites[False].options, sites[True].options, strict=True):
        op = LowRank.from_dense(weight, rank=absolute.size)
        error = squared(op, weight)
        assert (absolute.error, share.error) == pytest.approx((error, error / squares))
        assert absolute.cost == op.num_bits == 64 * op.macs_per_token
    assert sites[True].dense_cost == 64 * weight.numel()


def test_small_singular_values_beside_large_ones_are_not_lost():
    site = low_rank("site", [1e8, 1e-3, 1e-4, 1e-5], 10, 10, relative=False)
    errors = [option.error for option in site.options]
    assert errors == pytest.approx([1e-6 + 1e-8 + 1e-10, 1e-8 + 1e-10, 1e-10, 0.0, 0.0], rel=1e-12)


def test_measured_options_of_any_family():
    """Bits and errors of quantized weights, one of which is 30 times larger: it gets more bits."""
    torch.manual_seed(0)
    weights = {"small": torch.randn(16, 32), "large": 30 * torch.randn(16, 32)}
    sites = []
    for name, weight in weights.items():
        fits = {bits: Rtn(bits=bits, granularity="channel").fit(weight, {}) for bits in (8, 2, 4)}
        points = {b: (op.num_bits, squared(op, weight)) for b, op in fits.items()}
        sites.append(measured(name, 32 * weight.numel(), points))
    assert [option.size for option in sites[0].options] == [2, 4, 8]
    budget = sites[0].options[0].cost + sites[1].options[2].cost  # also enough for 4 bits in both
    chosen = by_spectrum(sites, budget)
    assert (chosen["small"].size, chosen["large"].size) == (2, 8)
    assert_maximal(sites, chosen, budget)
    pairs = [a.error + b.error for a, b in product(*(s.options for s in sites)) if a.cost + b.cost <= budget]
    assert error_of(chosen) == min(pairs)


def test_on_calibration_inputs_it_predicts_the_error_and_beats_uniform():
    """One weight sees inputs that span few directions, the other sees all: the second needs the ranks."""
    torch.manual_seed(0)
    inputs = {"few": torch.randn(200, 4) @ torch.randn(4, 24), "all": torch.randn(200, 24)}
    weights = {name: torch.randn(16, 24, dtype=torch.float64) for name in inputs}
    grams, sites = {}, []
    for name, weight in weights.items():
        grams[name] = Gram(24)
        grams[name].update(inputs[name].double())
        spectrum = torch.linalg.svdvals(weight @ inputs[name].double().T).tolist()
        sites.append(low_rank(name, spectrum, 24, 16, relative=True))
    even = uniform(sites, keep=0.6)
    ours = by_spectrum(sites, cost_of(even))
    for site in sites:
        option, weight, x = ours[site.name], weights[site.name], inputs[site.name].double()
        op = SvdLlm(keep=option.cost / site.dense_cost).fit(weight, {Gram: grams[site.name]})
        assert op.rank == option.size
        error = ((op.to_dense().detach() - weight) @ x.T).norm() / (weight @ x.T).norm()
        assert float(error) ** 2 == pytest.approx(option.error, abs=1e-9)
    assert ours["few"].size <= 4 < even["few"].size == even["all"].size < ours["all"].size
    assert cost_of(ours) == cost_of(even)
    assert error_of(ours) < error_of(even)
