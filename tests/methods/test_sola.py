"""SoLA: prime neurons are exact, the rest is the best on the inputs, and the ranks are shared out as well as can be.

Shape letters: I inputs, N tokens.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import silu

from tensormix.methods import Sola, SvdLlm
from tensormix.methods.base import Layer, RoleError
from tensormix.methods.sola import Ranks, prime_first
from tensormix.statistics import Gram, InputMagnitudes

DOUBLE = {"dtype": torch.float64}
D, NEURONS = 16, 40


def seen(tokens):  # (N, I)
    stats = {kind: kind(tokens.shape[1]) for kind in (Gram, InputMagnitudes)}
    for statistic in stats.values():
        statistic.update(tokens)
    return stats


def mlp(dominant: int, seed: int = 0):
    """A gated MLP in which `dominant` neurons carry nearly everything, its inputs, and its statistics."""
    torch.manual_seed(seed)
    gate, up = torch.randn(NEURONS, D, **DOUBLE), torch.randn(NEURONS, D, **DOUBLE)
    down = torch.randn(D, NEURONS, **DOUBLE) / NEURONS**0.5
    loud = torch.randperm(NEURONS)[:dominant]
    up[loud] *= 30
    layers = {"gate": Layer(gate, torch.randn(NEURONS, **DOUBLE)), "up": Layer(up), "down": Layer(down)}
    x = torch.randn(300, D, **DOUBLE)
    hidden = silu(x @ gate.T + layers["gate"].bias) * (x @ up.T)
    at = seen(x)
    return layers, x, {"gate": at, "up": at, "down": seen(hidden)}, loud


def output(operators, x):
    inner = silu(operators["gate"](x)) * operators["up"](x)
    return operators["down"](inner)


def dense_output(layers, x):
    hidden = silu(x @ layers["gate"].weight.T + layers["gate"].bias) * (x @ layers["up"].weight.T)
    return hidden @ layers["down"].weight.T


def num_params(operators):
    return sum(op.num_params for op in operators.values())


def test_prime_first_keeps_the_order_otherwise():
    assert prime_first(torch.tensor([1.0, 9, 2, 8, 3]), 2).tolist() == [1, 3, 0, 2, 4]
    assert prime_first(torch.tensor([1.0, 9, 2]), 0).tolist() == [0, 1, 2]
    assert prime_first(torch.tensor([1.0, 9, 2]), 3).tolist() == [0, 1, 2]


def test_the_loudest_neurons_stay_exactly():
    layers, _, stats, loud = mlp(6)
    made = Sola(prime=0.15, ranks=Ranks(gate=3, up=3, down=3)).fit(layers, stats, None)
    first = loud.sort().values
    assert torch.equal(made["gate"].to_dense()[:6], layers["gate"].weight[first])
    assert torch.equal(made["up"].to_dense()[:6], layers["up"].weight[first])
    assert torch.equal(made["down"].to_dense()[:, :6], layers["down"].weight[:, first])
    assert torch.equal(made["gate"].bias[:6], layers["gate"].bias[first])


@pytest.mark.parametrize("prime", [0.0, 0.3, 1.0])
def test_with_everything_kept_the_mlp_is_the_same(prime):
    layers, x, stats, _ = mlp(5)
    made = Sola(keep=1.0, prime=prime).fit(layers, stats, None)
    torch.testing.assert_close(output(made, x), dense_output(layers, x), rtol=1e-10, atol=1e-9)
    assert num_params(made) == sum(layer.weight.numel() for layer in layers.values())


def test_full_rank_is_the_same_in_any_order():
    layers, x, stats, _ = mlp(5)
    made = Sola(prime=0.25, ranks=Ranks(gate=16, up=16, down=16)).fit(layers, stats, None)
    assert type(made["gate"]).__name__ == "Concat"
    torch.testing.assert_close(output(made, x), dense_output(layers, x), rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_bits_it_beats_svd_llm_where_few_neurons_dominate(seed):
    layers, x, stats, _ = mlp(6, seed)
    made = Sola(keep=0.6, prime=0.15, granularity=1).fit(layers, stats, None)
    rival = {}
    for role, layer in layers.items():
        rival[role] = SvdLlm(keep=0.6).fit(layer.weight, stats[role])
        rival[role].bias = None if layer.bias is None else torch.nn.Parameter(layer.bias)
    budget = 0.6 * sum(layer.weight.numel() for layer in layers.values())
    assert num_params(made) <= budget
    wanted = dense_output(layers, x)
    ours, theirs = ((output(ops, x) - wanted).norm() for ops in (made, rival))
    assert ours < 0.5 * theirs


def test_without_prime_neurons_it_is_svd_llm():
    layers, _, stats, _ = mlp(6)
    layers["q"], stats["q"] = Layer(torch.randn(24, D, **DOUBLE)), stats["gate"]
    rank = {role: SvdLlm(keep=0.5).empty(*layer.weight.shape[::-1]).rank for role, layer in layers.items()}
    made = Sola(prime=0.0, ranks=Ranks(**rank)).fit(layers, stats, None)
    for role, layer in layers.items():
        alone = SvdLlm(keep=0.5).fit(layer.weight, stats[role])
        torch.testing.assert_close(made[role].to_dense(), alone.to_dense(), rtol=1e-9, atol=1e-9)


def relative_errors(layers, stats, prime=0.0):
    """Role -> for each rank the squares lost, as a fraction of all, of matrices without prime neurons."""
    spectra = {
        role: torch.linalg.svdvals(layer.weight @ torch.linalg.cholesky(stats[role][Gram].mean)).square()
        for role, layer in layers.items()
    }
    return {role: [float(s[rank:].sum() / s.sum()) for rank in range(len(s) + 1)] for role, s in spectra.items()}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
def test_ranks_are_shared_out_optimally(keep):
    """Three matrices with equal steps: no other choice of ranks within the budget has a smaller sum of errors."""
    torch.manual_seed(1)
    spectra = {"q": 0.5, "k": 0.8, "o": 0.95}
    layers, stats = {}, {}
    for role, decay in spectra.items():
        u, v = (torch.linalg.qr(torch.randn(12, 12, **DOUBLE)).Q for _ in range(2))
        layers[role] = Layer(u @ torch.diag(decay ** torch.arange(12, **DOUBLE)) @ v)
        stats[role] = seen(torch.randn(100, 12, **DOUBLE))
    made = Sola(keep=keep, granularity=1).fit(layers, stats, None)
    errors = relative_errors(layers, stats)
    budget = keep * 3 * 144

    def cost(rank):
        return 144 if rank == 12 else 24 * rank

    choices = [ranks for ranks in product([*range(1, 6), 12], repeat=3) if sum(map(cost, ranks)) <= budget]
    best = min(sum(errors[role][rank] for role, rank in zip(spectra, ranks, strict=True)) for ranks in choices)
    found = {role: getattr(op, "rank", 12) for role, op in made.items()}
    assert sum(errors[role][rank] for role, rank in found.items()) == pytest.approx(best, rel=1e-9)
    assert len(set(found.values())) > 1


def test_shared_ranks_are_never_worse_than_equal_ones():
    layers, _, stats, _ = mlp(2)
    errors = relative_errors(layers, stats)
    made = Sola(keep=0.5, prime=0.0, granularity=1).fit(layers, stats, None)
    equal = {role: SvdLlm(keep=0.5).empty(*layer.weight.shape[::-1]).rank for role, layer in layers.items()}
    ours = sum(errors[role][getattr(op, "rank", -1)] for role, op in made.items())
    assert ours <= sum(errors[role][rank] for role, rank in equal.items())


def test_v_is_untouched_and_counts_in_the_budget():
    torch.manual_seed(0)
    layers = {role: Layer(torch.randn(12, 12)) for role in ("q", "k", "v")}
    stats = dict.fromkeys(layers, seen(torch.randn(50, 12)))
    made = Sola(keep=0.6, granularity=1).fit(layers, stats, None)
    assert torch.equal(made["v"].to_dense(), layers["v"].weight)
    assert 0.5 * 3 * 144 < num_params(made) <= 0.6 * 3 * 144


@pytest.mark.parametrize(
    ("method", "shapes", "sentence"),
    [
        (
            Sola(keep=0.3, prime=0.5, granularity=1),
            {"up": (40, 16), "down": (16, 40)},
            r"keep=0\.3 cannot be met with prime=0\.5 and v dense: the smallest possible keep is 0\.5563, the larg",
        ),
        (Sola(ranks=Ranks(q=17)), {"q": (40, 16)}, r"q: sola: rank 17 is more than the 16 that the layer allows there"),
        (Sola(keep=0.5), {"up": (40, 16)}, r"sola changes up, down together, but down is not among its sites"),
    ],
)
def test_what_cannot_be(method, shapes, sentence):
    with pytest.raises(ValueError, match=sentence):
        method.empty(shapes, None)


def test_keep_or_ranks():
    for settings in ({}, {"keep": 0.5, "ranks": {"q": 3}}):
        with pytest.raises(ValidationError, match=r"sola needs either keep .* or ranks"):
            Sola.model_validate(settings)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Ranks.model_validate({"v": 3})


def test_inputs_without_any_variance_name_the_role():
    layers, _, stats, _ = mlp(6)
    with pytest.raises(RoleError, match="down: the calibration inputs are all zero"):
        Sola(keep=0.6, granularity=1).fit(layers, {**stats, "down": seen(torch.zeros(5, NEURONS))}, None)


def test_dead_neurons_and_fewer_tokens_than_features():
    layers, _, _, _ = mlp(4)
    layers["up"].weight[[1, 2, 30]] = 0
    x = torch.randn(7, D, **DOUBLE)
    hidden = silu(x @ layers["gate"].weight.T + layers["gate"].bias) * (x @ layers["up"].weight.T)
    stats = {"gate": seen(x), "up": seen(x), "down": seen(hidden)}
    made = Sola(prime=0.1, ranks=Ranks(gate=7, up=7, down=7)).fit(layers, stats, None)
    torch.testing.assert_close(output(made, x), dense_output(layers, x), rtol=1e-6, atol=1e-6)
