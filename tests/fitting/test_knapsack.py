"""The choice of least error within a budget, against all choices there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from site_options import any_budget, any_sites, cost_of, error_of, low_rank_sites, optima
from tensormix.fitting.divide import by_spectrum, lower_bound, measured
from tensormix.fitting.knapsack import optimal


@settings(deadline=None, max_examples=150)
@given(st.data(), st.one_of(any_sites(), low_rank_sites(((2, 3), (3, 3), (2, 7), (4, 4)))))
def test_no_choice_within_the_budget_is_better(data, sites):
    budget = data.draw(any_budget(sites))
    found = optimal(sites, budget)
    assert cost_of(found.chosen) <= budget
    assert found.error == found.bound == pytest.approx(optima(sites, budget)[-1], abs=1e-9)
    assert found.error == pytest.approx(error_of(found.chosen), abs=1e-9)
    assert all(found.chosen[site.name] in site.allowed for site in sites)


def test_it_is_better_than_the_greedy_choice_where_that_leaves_room():
    """One unit too little for the best step: greedy takes the next one and cannot go back."""
    sites = [measured(f"s{number}", 9, {"no": (0, 3.0), "yes": (3, 0.0)}) for number in range(2)]
    sites.append(measured("small", 9, {"no": (0, 2.5), "yes": (2, 0.0)}))
    assert error_of(by_spectrum(sites, 6)) == 3.0 + 0.0
    assert optimal(sites, 6).error == 2.5


def test_sixty_lists_of_thirty_options_take_moments():
    """Costs without a common divisor, errors of any shape: the bound leaves few states."""
    torch.manual_seed(0)
    sites = []
    for number in range(60):
        costs = torch.randint(1, 10**6, (30,)).sort().values.tolist()
        errors = (torch.rand(30) * (1 + number)).sort(descending=True).values.tolist()
        sites.append(measured(f"s{number}", 10**6, dict(enumerate(zip(costs, errors, strict=True)))))
    budget = 30 * 10**6
    found = optimal(sites, budget)
    assert lower_bound(sites, budget) <= found.error <= error_of(by_spectrum(sites, budget))
    assert found.error == found.bound and cost_of(found.chosen) <= budget


def test_with_too_many_states_it_is_the_greedy_choice_and_says_how_far_it_may_be_off():
    sites = [measured(f"s{number}", 9, {"no": (0, 3.0), "yes": (3, 0.0)}) for number in range(2)]
    sites.append(measured("small", 9, {"no": (0, 2.5), "yes": (2, 0.0)}))
    found = optimal(sites, 6, most=1)
    assert found.chosen == by_spectrum(sites, 6)
    assert found.bound == lower_bound(sites, 6) < 2.5 < found.error


def test_a_budget_below_the_cheapest_choice_is_refused():
    site = measured("s", 9, {"a": (4, 1.0)})
    with pytest.raises(ValueError, match="a budget of 3 cannot be met: it must be from 4"):
        optimal([site], 3)
