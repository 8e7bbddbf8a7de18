"""Windows of several sources take turns: every row of neighbours has its share of each."""

from hypothesis import given
from hypothesis import strategies as st

from tensormix.data.windows import interleaved


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_every_beginning_has_its_shares_to_within_a_window(weights, seed):
    chosen = interleaved(weights, 60, seed)
    for number in range(1, 61):
        for place, weight in enumerate(weights):
            share = number * weight / sum(weights)
            assert abs(chosen[:number].count(place) - share) < max(1, len(weights) - 1)


def test_sources_of_one_weight_are_read_in_rounds_whose_order_is_drawn():
    chosen = interleaved([1.0, 1.0, 1.0], 30, 0)
    rounds = [tuple(chosen[start : start + 3]) for start in range(0, 30, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert len(set(rounds)) > 1
    assert chosen != interleaved([1.0, 1.0, 1.0], 30, 1)
