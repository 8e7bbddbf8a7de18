from __future__ import annotations

import pytest
import torch

from tensormix.methods import Laser, laser_search


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (30, 70)])
@pytest.mark.parametrize("keep_rank", [0.05, 0.2, 0.29, 0.4])
def test_it_is_the_truncated_svd_of_the_papers_rank(shape, keep_rank):
    """rho = 1 - 0.1 t, r = int(rho min(m, n)), and what is stored is less than the dense weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    op = Laser(keep_rank=keep_rank).fit(weight, {})
    assert op.rank == int(round(keep_rank * min(shape), 6))
    tail = torch.linalg.svdvals(weight)[op.rank :].norm()
    torch.testing.assert_close((op.to_dense() - weight).norm(), tail, rtol=1e-4, atol=0)
    assert op.num_params == op.rank * sum(shape) < weight.numel()


def test_keep_rank_is_not_lost_to_rounding():
    """0.29 * 100 is 28.999999999999996 in fp64."""
    assert Laser(keep_rank=0.29).rank(100, 100) == 29


@pytest.mark.parametrize("sizes", [(64, 64), (4096, 11008), (30, 7), (3, 2), (60000, 60000)])
def test_the_ranks_that_the_errors_name_are_usable(sizes):
    with pytest.raises(ValueError, match=r"the largest rank that stores less is \d+ \(keep_rank=") as refused:
        Laser(keep_rank=1).empty(*sizes)
    largest, nearest = str(refused.value).removesuffix(").").split("less is ")[1].split(" (keep_rank=")
    op = Laser(keep_rank=float(nearest)).empty(*sizes)
    assert op.rank == int(largest)
    assert op.num_params < sizes[0] * sizes[1] <= (op.rank + 1) * sum(sizes)
    if min(sizes) > 2:
        with pytest.raises(ValueError, match=r"the smallest usable keep_rank is ") as refused:
            Laser(keep_rank=0.9 / min(sizes)).empty(*sizes)
        smallest = float(str(refused.value).split("keep_rank is ")[1].removesuffix("."))
        assert Laser(keep_rank=smallest).empty(*sizes).rank == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Laser(), r"keep_rank\n\s+Field required"),
        (lambda: Laser(keep_rank=0), r"greater than 0"),
        (lambda: Laser(keep_rank=1.1), r"less than or equal to 1"),
        (
            lambda: Laser(keep_rank=0.9).fit(torch.ones(64, 64), {}),
            r"Laser: keep_rank=0\.9 is rank 57 for a 64x64 layer, which stores 7296 numbers, the dense weight 4096; "
            r"the largest rank that stores less is 31 \(keep_rank=0\.484375\)\.",
        ),
        (
            lambda: Laser(keep_rank=0.01).empty(64, 80),
            r"Laser: keep_rank=0\.01 leaves no rank for a 64x80 layer; the smallest usable keep_rank is 0\.015625\.",
        ),
        (
            lambda: Laser(keep_rank=0.5).empty(2, 2),
            r"Laser: rank 1 of a 2x2 layer stores 4 numbers, the dense weight 4; leave this layer dense\.",
        ),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


SITES = ("0.up", "0.down", "1.up", "1.down")
RATES = (0.4, 0.2, 0.05)
CANDIDATES = [(site, rate) for site in SITES for rate in RATES]


class Planted:
    """Accuracy is a sum of what each choice adds; counts how often it is asked."""

    def __init__(self, gains, log_losses=None):
        self.gains, self.log_losses, self.asked = gains, log_losses or {}, []

    def __call__(self, choices):
        self.asked.append(dict(choices))
        accuracy = 50 + sum(self.gains.get(pair, -1) for pair in choices.items())
        return accuracy, 2 + sum(self.log_losses.get(pair, 0) for pair in choices.items())


def test_the_search_finds_a_planted_optimum():
    """Every site has its own effect, so the best set holds the best rate of each site that helps, and nothing else."""
    planted = Planted(
        {("0.down", 0.05): 3, ("0.down", 0.2): 2, ("1.up", 0.4): 1, ("1.down", 0.2): 4, ("1.down", 0.4): 3}
    )
    chosen, trace = laser_search(CANDIDATES, planted)
    assert chosen == {"1.down": 0.2, "0.down": 0.05, "1.up": 0.4}
    assert max(trace, key=lambda trial: trial.accuracy).choices == chosen
    assert [dict(trial.choices) for trial in trace] == planted.asked
    assert planted.asked[:13] == [{}, *({site: rate} for site, rate in CANDIDATES)]
    assert planted.asked[13:] == [
        {"1.down": 0.2, "0.down": 0.05},
        {"1.down": 0.2, "0.down": 0.05, "1.up": 0.4},
        {"1.down": 0.2, "0.down": 0.05, "1.up": 0.4, "0.up": 0.4},
    ]
    assert trace[0].accuracy == 50 and trace[-2].accuracy == 58 and trace[0].log_loss == 2


def test_choices_that_spoil_each_other_are_not_put_together():
    def score(choices):
        return (50 if len(choices) > 1 else 50 + choices.get("0.up", 0) + choices.get("1.up", 0)), 1.0

    assert laser_search(CANDIDATES, score)[0] == {"0.up": 0.4}


def test_the_dense_model_stays_where_nothing_beats_it():
    chosen, trace = laser_search(CANDIDATES, Planted({pair: 0 for pair in CANDIDATES}))
    assert chosen == {}
    assert len(trace) == 13, "nothing is scored twice"


def test_ties_are_settled_by_log_loss_and_then_by_order():
    gains = {pair: 1 for pair in CANDIDATES if pair[0] in ("0.up", "1.up")}
    spoils = {"0.down": 9, "1.down": 9}  # of log-loss

    def search(candidates, log_losses):
        losses = {**{pair: spoils.get(pair[0], 0) for pair in CANDIDATES}, **log_losses}
        return laser_search(candidates, Planted(gains, losses))[0]

    assert search(CANDIDATES, {}) == {"0.up": 0.4, "1.up": 0.4}
    assert search(CANDIDATES[::-1], {}) == {"1.up": 0.05, "0.up": 0.05}
    assert search(CANDIDATES, {("0.up", 0.2): -0.5, ("1.up", 0.05): -0.1}) == {"0.up": 0.2, "1.up": 0.05}
    assert list(search(CANDIDATES, {("1.up", 0.2): -0.5})) == ["1.up", "0.up"]


@pytest.mark.parametrize(
    ("candidates", "score", "sentence"),
    [
        ([], Planted({}), r"laser_search: there are no candidates; give pairs of a site and a keep_rank"),
        ([("a", 0.1), ("a", 0.1)], Planted({}), r"the candidate \('a', 0\.1\) stands there twice; each is scored once"),
        (
            [("a", 0.1)],
            lambda _: (float("nan"), 1.0),
            r"score of the dense model must be two finite numbers, .* got nan, 1",
        ),
        ([("a", 0.1)], lambda c: (1.0, float("inf") if c else 1.0), r"score of \{'a': 0\.1\} must be .* got 1\.0, inf"),
    ],
)
def test_what_cannot_be_searched_is_refused(candidates, score, sentence):
    with pytest.raises(ValueError, match=sentence):
        laser_search(candidates, score)
