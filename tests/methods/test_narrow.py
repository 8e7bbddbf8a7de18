"""Narrow blocks: what is planted in few coordinates is found and loses nothing, and each part is the optimum it claims.

Shape letters: D hidden size, P coordinates that stay, N tokens, H heads, G heads of keys and values, C channels of a
head, R channels that stay.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fitted import applied, gram
from tensormix.methods import Narrow, SvdLlm
from tensormix.methods.base import Heads, Layer
from tensormix.methods.narrow import loudest_neurons, value_maps
from tensormix.statistics import Gram

DOUBLE = {"dtype": torch.float64}


def planted(num_tokens, seed=0):
    """An MLP that reads and writes the first 6 of 12 channels alone and has 8 neurons that do something, of 24."""
    torch.manual_seed(seed)
    x = torch.randn(num_tokens, 12, **DOUBLE)
    gate, up, down = torch.zeros(24, 12, **DOUBLE), torch.zeros(24, 12, **DOUBLE), torch.zeros(12, 24, **DOUBLE)
    alive = torch.randperm(24)[:8]
    gate[alive, :6], up[alive, :6] = torch.randn(8, 6, **DOUBLE), torch.randn(8, 6, **DOUBLE)
    gate[:, 0] += 1  # every neuron opens, but those that are not alive have no value or are not read
    down[:6] = torch.randn(6, 24, **DOUBLE)
    layers = {"down": Layer(down, torch.randn(12, **DOUBLE)), "gate": Layer(gate, torch.randn(24, **DOUBLE))}
    layers["up"] = Layer(up)
    return layers, x, F.silu(x @ gate.T + layers["gate"].bias) * (x @ up.T)


def test_a_planted_narrow_mlp_is_found_and_loses_nothing():
    layers, x, hidden = planted(200)
    stats = {"gate": gram(x), "up": gram(x), "down": gram(hidden)}
    made = Narrow(keep=1 / 6, width=0.5).fit(layers, stats, None)
    ours = applied(made["down"], F.silu(applied(made["gate"], x)) * applied(made["up"], x))
    theirs = hidden @ layers["down"].weight.T + layers["down"].bias
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert {role: op.num_params for role, op in made.items()} == {"gate": 48, "up": 48, "down": 48}  # of 288 each
    lost = SvdLlm(keep=1 / 6).fit(layers["up"].weight, gram(x)).to_dense() - layers["up"].weight
    assert (x @ lost.T).norm() > 0.3 * (x @ layers["up"].weight.T).norm()  # two factors of as many numbers cannot


def test_readers_and_down_are_exact_least_squares_of_what_stays():
    torch.manual_seed(0)
    mix = torch.randn(10, 10, **DOUBLE)
    x, hidden = torch.randn(300, 10, **DOUBLE) @ mix, torch.randn(300, 15, **DOUBLE) @ torch.randn(15, 15, **DOUBLE)
    layers = {"up": Layer(torch.randn(15, 10, **DOUBLE)), "down": Layer(torch.randn(10, 15, **DOUBLE))}
    made = Narrow(keep=0.24, width=0.6).fit(
        layers, {"up": gram(x), "down": gram(hidden)}, None
    )  # 6 channels, 6 neurons
    chosen = loudest_neurons(layers["down"].weight[:6], hidden.T @ hidden, 6)
    reader = torch.linalg.lstsq(x[:, :6], x @ layers["up"].weight[chosen].T).solution.T
    writer = torch.linalg.lstsq(hidden[:, chosen], hidden @ layers["down"].weight[:6].T).solution.T
    torch.testing.assert_close(made["up"].inner.to_dense(), reader, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(made["down"].inner.to_dense(), writer, rtol=1e-7, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 3), channels=st.integers(2, 5), tokens=st.sampled_from([3, 40]), seed=st.integers(0, 99))
def test_values_are_the_best_rank_of_every_head(groups, channels, tokens, seed):
    """Each head alone: no R directions of the channels lose less of what o puts out than the whitened SVD does."""
    torch.manual_seed(seed)
    heads, width = Heads(groups, groups, channels), groups * channels
    z = torch.randn(tokens, width, **DOUBLE) @ torch.randn(width, width, **DOUBLE)
    weight = torch.randn(7, width, **DOUBLE)
    for rank in range(1, channels + 1):
        into, back = value_maps(weight, z.T @ z, heads, rank)
        assert into.shape == (groups, rank, channels) and back.shape == (groups, channels, rank)
        for head in range(groups):
            own = slice(head * channels, (head + 1) * channels)
            out = z[:, own] @ weight[:, own].T
            lost = (out - z[:, own] @ into[head].T @ back[head].T @ weight[:, own].T).square().sum()
            optimum = torch.linalg.svdvals(out)[rank:].square().sum()
            torch.testing.assert_close(lost, optimum, rtol=1e-7, atol=1e-9 * float(out.square().sum()))


def test_grouped_queries_and_biases_lose_nothing_where_the_values_have_few_directions():
    """Four query heads on two heads of values, whose values span three of eight channels, through any attention."""
    torch.manual_seed(0)
    heads = Heads(4, 2, 8)
    v = torch.cat([torch.randn(8, 3, **DOUBLE) @ torch.randn(3, 10, **DOUBLE) for _ in range(2)])
    inside = torch.cat([part @ torch.randn(10, **DOUBLE) for part in v.split(8)])
    layers = {"v": Layer(v, inside), "o": Layer(torch.randn(10, 32, **DOUBLE), torch.randn(10, **DOUBLE))}
    x = torch.randn(60, 10, **DOUBLE)
    attended = torch.rand(4, 60, 60, **DOUBLE)

    def outputs(values):  # (N, G C) -> (N, H C)
        of_head = values.view(60, 2, 8).repeat_interleave(2, dim=1)
        return torch.einsum("hnm,mhc->nhc", attended, of_head).flatten(1)

    seen = outputs(x @ v.T + inside)
    made = Narrow(keep=3 / 8).fit(layers, {"v": gram(x), "o": gram(seen)}, heads)
    ours = applied(made["o"], outputs(applied(made["v"], x)))
    torch.testing.assert_close(ours, seen @ layers["o"].weight.T + layers["o"].bias, rtol=1e-7, atol=1e-7)
    assert made["v"].num_params == 2 * 3 * 10 and made["o"].num_params == 10 * 4 * 3


def test_o_is_the_exact_least_squares_of_the_values_that_stay():
    torch.manual_seed(0)
    heads = Heads(4, 2, 4)
    z, x = torch.randn(200, 16, **DOUBLE) @ torch.randn(16, 16, **DOUBLE), torch.randn(200, 10, **DOUBLE)
    layers = {"v": Layer(torch.randn(8, 10, **DOUBLE)), "o": Layer(torch.randn(10, 16, **DOUBLE))}
    made = Narrow(keep=0.3, width=0.6).fit(layers, {"v": gram(x), "o": gram(z)}, heads)  # 6 channels, 2 of each head
    into, _ = value_maps(layers["o"].weight[:6], gram(z)[Gram].mean, heads, 2)
    kept = z @ torch.block_diag(*into.repeat_interleave(2, dim=0)).T
    expected = torch.linalg.lstsq(kept, z @ layers["o"].weight[:6].T).solution.T
    torch.testing.assert_close(made["o"].inner.to_dense(), expected, rtol=1e-7, atol=1e-7)


def test_of_the_neurons_those_stay_of_which_down_puts_out_most():
    hidden = torch.tensor([[1.0, 10.0, 2.0, 0.0], [1.0, -10.0, 2.0, 0.0]], **DOUBLE)
    down = torch.tensor([[3.0, 0.1, 2.0, 99.0]], **DOUBLE)  # what they put out: 3, 1, 4, 0
    assert loudest_neurons(down, hidden.T @ hidden, 2).tolist() == [0, 2]


def test_all_of_the_numbers_is_the_layer_itself():
    layers, x, hidden = planted(30)
    stats = {"gate": gram(x), "up": gram(x), "down": gram(hidden)}
    made = Narrow(keep=1.0).fit(layers, stats, None)
    assert all(torch.equal(made[role].to_dense(), layer.weight) for role, layer in layers.items())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: Narrow(keep=0.5, width=0.25),
            r"width=0\.25 is below keep=0\.5.*smallest width is 0\.5, the largest 1",
        ),
        (
            lambda: Narrow(keep=0.01).empty({"up": (40, 24), "down": (24, 40)}, None),
            r"Narrow: keep=0\.01 at width=1\.0 leaves none of 40 neurons; the smallest usable keep .* 0\.02",
        ),
        (
            lambda: Narrow(keep=0.1, width=0.9).empty({"v": (16, 24), "o": (24, 32)}, Heads(4, 2, 8)),
            r"leaves none of 8 channels of a head; the smallest usable keep at this width is 0\.11",
        ),
        (lambda: Narrow(keep=0.5).empty({"up": (40, 24)}, None), r"narrow changes up, down together, but down is not"),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
