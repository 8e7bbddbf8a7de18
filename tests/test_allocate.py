from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from math import ceil, inf, nan

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tensormix.allocate import (
    Option,
    SiteOptions,
    budget_of,
    by_sensitivity,
    by_spectrum,
    iprs,
    low_rank,
    lower_bound,
    measured,
    uniform,
)
from tensormix.methods import Rtn, SvdLlm
from tensormix.methods.ranks import rank_for
from tensormix.operators import LowRank, StructuredLinear
from tensormix.statistics import Gram

DENSE = 24
EQUAL_STEPS = ((8, 8), (6, 10), (12, 4))  # I + O is the same
FEW = settings(deadline=None, max_examples=60)

spectra = st.lists(st.integers(0, 9), max_size=6).map(lambda values: sorted(map(float, values), reverse=True))


@st.composite
def low_rank_sites(draw, shapes=EQUAL_STEPS, granularities=(1,)) -> list[SiteOptions]:
    granularity = draw(st.sampled_from(granularities))
    return [
        low_rank(f"s{place}", draw(spectra), *shape, relative=False, granularity=granularity)
        for place, shape in enumerate(draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=4)))
    ]


@st.composite
def any_sites(draw) -> list[SiteOptions]:
    """Costs and errors without any shape: most of these lists are not convex."""
    sites = []
    for place in range(draw(st.integers(1, 4))):
        costs = sorted(draw(st.sets(st.integers(0, DENSE), min_size=1, max_size=5)))
        errors = sorted(draw(st.lists(st.integers(0, 30), min_size=len(costs), max_size=len(costs))), reverse=True)
        points = {f"{cost}": (cost, float(error)) for cost, error in zip(costs, errors, strict=True)}
        sites.append(measured(f"s{place}", DENSE, points))
    return sites


def smallest(sites: list[SiteOptions]) -> int:
    return sum(site.allowed[0].cost for site in sites)


def any_budget(sites: list[SiteOptions]) -> st.SearchStrategy[int]:
    return st.integers(smallest(sites), sum(site.dense_cost for site in sites))


def cost_of(chosen: dict[str, Option]) -> int:
    return sum(option.cost for option in chosen.values())


def error_of(chosen: dict[str, Option]) -> float:
    return sum(option.error for option in chosen.values())


def optima(sites: list[SiteOptions], budget: int) -> list[float]:
    """The smallest sum of errors for every budget up to this one, by dynamic programming."""
    best = [0.0] * (budget + 1)
    for site in sites:
        options = site.allowed
        best = [
            min((best[room - o.cost] + o.error for o in options if o.cost <= room), default=inf)
            for room in range(budget + 1)
        ]
    return best


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


def squared(op: StructuredLinear, weight: torch.Tensor) -> float:
    return float((op.to_dense().detach() - weight).square().sum())


def assert_maximal(sites: list[SiteOptions], chosen: dict[str, Option], budget: int) -> None:
    """Within the budget, and no option with a smaller error fits at any one site."""
    assert list(chosen) == [site.name for site in sites]
    room = budget - cost_of(chosen)
    assert room >= 0
    for site in sites:
        now = chosen[site.name]
        assert now in site.allowed
        better = [o for o in site.allowed if o.error < now.error and o.cost - now.cost <= room]
        assert not better, f"{site.name}: {better[0]} fits into {room} more than {now}"


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
