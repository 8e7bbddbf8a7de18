"""FLAT-LLM: the heads lose as little as any projection does, and down is the exact least squares of what stays.

Shape letters: I inputs, N tokens, H heads, G heads of keys and values, C channels of a head, R channels that stay.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitted import applied, gram
from tensormix.fitting.whitening import refitted
from tensormix.methods import FlatLlm, SvdLlm
from tensormix.methods.base import Heads, Layer, RoleError
from tensormix.methods.flat_llm import head_bases, leading_neurons

DOUBLE = {"dtype": torch.float64}


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 3), shared=st.integers(1, 3), channels=st.integers(2, 6), seed=st.integers(0, 99))
def test_heads_reach_the_optimum_of_every_rank(groups, shared, channels, seed):
    """The squares lost beside the best R directions are the smallest eigenvalues, summed over heads that share them."""
    torch.manual_seed(seed)
    heads = Heads(groups * shared, groups, channels)
    outputs = torch.randn(11, heads.num_heads * channels, **DOUBLE) @ torch.randn(
        heads.num_heads * channels, heads.num_heads * channels, **DOUBLE
    )
    each = outputs.view(11, groups, shared, channels)
    for rank in range(1, channels + 1):
        bases = head_bases(outputs.T @ outputs, heads, rank)  # (G, C, R)
        projected = torch.einsum("ngsc,gcr,gdr->ngsd", each, bases, bases)
        stacked = each.permute(1, 0, 2, 3).reshape(groups, -1, channels)
        optimum = torch.linalg.svdvals(stacked)[:, rank:].square().sum()
        torch.testing.assert_close((each - projected).square().sum(), optimum, rtol=1e-9, atol=1e-9 * each.norm() ** 2)


@pytest.mark.parametrize("num_tokens", [5, 200], ids=["fewer_than_neurons", "many"])
def test_down_is_the_exact_least_squares(num_tokens):
    torch.manual_seed(0)
    x, weight = torch.randn(num_tokens, 12, **DOUBLE) @ torch.randn(12, 12, **DOUBLE), torch.randn(7, 12, **DOUBLE)
    chosen = torch.tensor([0, 3, 4, 8])
    found = refitted(weight, x.T @ x, chosen)
    expected = torch.linalg.lstsq(x[:, chosen], x @ weight.T, driver="gelsd").solution.T
    torch.testing.assert_close(x[:, chosen] @ found.T, x[:, chosen] @ expected.T, rtol=1e-7, atol=1e-7)


def test_of_equal_least_squares_the_one_nearest_to_the_weight():
    """One token cannot tell four neurons apart: none of them moves more than it must."""
    torch.manual_seed(0)
    x, weight, chosen = torch.randn(1, 6, **DOUBLE), torch.randn(3, 6, **DOUBLE), torch.arange(4)
    found = refitted(weight, x.T @ x, chosen)
    step = (x @ weight.T - x[:, :4] @ weight[:, :4].T).T @ x[:, :4] / x[:, :4].square().sum()
    torch.testing.assert_close(found, weight[:, :4] + step, rtol=1e-7, atol=1e-9)


def test_a_neuron_that_others_make_up_for_goes_first_and_nothing_is_lost():
    torch.manual_seed(0)
    x = torch.randn(100, 10, **DOUBLE)
    x[:, 3] = 0  # dead
    x[:, 7] = 0.5 * x[:, 1] - 2 * x[:, 5]  # loud, but told by two others
    x[:, 9] *= 0.05  # quiet, but nobody else says it
    weight = torch.randn(4, 10, **DOUBLE)
    chosen = leading_neurons(x.T @ x / 100, 8, ridge=1e-9)
    assert 3 not in chosen and 9 in chosen and len({1, 5, 7} & set(chosen.tolist())) == 2
    torch.testing.assert_close(x[:, chosen] @ refitted(weight, x.T @ x, chosen).T, x @ weight.T, rtol=1e-6, atol=1e-6)


def test_an_mlp_without_its_redundant_neurons_is_the_same():
    """Of ten neurons one is dead and one is the double of another; the biases follow the neurons that stay."""
    torch.manual_seed(0)
    up = Layer(torch.randn(10, 6, **DOUBLE), torch.randn(10, **DOUBLE))
    down = Layer(torch.randn(4, 10, **DOUBLE), torch.randn(4, **DOUBLE))
    up.weight[0], up.bias[0] = 0, -1  # never active
    up.weight[2], up.bias[2] = 2 * up.weight[5], 2 * up.bias[5]
    x = torch.randn(80, 6, **DOUBLE)
    hidden = (x @ up.weight.T + up.bias).relu()
    made = FlatLlm(keep=0.8, ridge=1e-9).fit({"up": up, "down": down}, {"down": gram(hidden)}, None)
    ours = applied(made["down"], applied(made["up"], x).relu())
    torch.testing.assert_close(ours, hidden @ down.weight.T + down.bias, rtol=1e-6, atol=1e-6)
    assert made["up"].num_params == 8 * 6 and made["down"].num_params == 4 * 8


def test_scores_are_ridge_leverage_scores():
    torch.manual_seed(0)
    x = torch.randn(5, 8, **DOUBLE)  # rank deficient
    cov, ridge = x.T @ x, 0.01
    damped = cov + ridge * cov.diagonal().mean() * torch.eye(8, **DOUBLE)
    scores = torch.linalg.solve(damped, cov).diagonal()
    for count in (1, 3, 8):
        assert leading_neurons(cov, count, ridge).tolist() == scores.topk(count).indices.sort().values.tolist()


def attention(seed=0):
    """v and o, with a bias in v; the outputs of 4 heads on 2 heads of values span 3 of 8 channels."""
    torch.manual_seed(seed)
    heads = Heads(4, 2, 8)
    v = torch.cat([torch.randn(8, 3, **DOUBLE) @ torch.randn(3, 10, **DOUBLE) for _ in range(2)])
    inside = torch.cat([part @ torch.randn(10, **DOUBLE) for part in v.split(8)])  # a bias in the same 3 directions
    return heads, {"v": Layer(v, inside), "o": Layer(torch.randn(12, 32, **DOUBLE), torch.randn(12, **DOUBLE))}


def test_heads_of_low_rank_lose_nothing_through_v_and_o():
    heads, layers = attention()
    x = torch.randn(50, 10, **DOUBLE)
    values = (x @ layers["v"].weight.T + layers["v"].bias).view(50, 2, 8).repeat_interleave(2, dim=1)
    weights = torch.rand(4, 50, 50, **DOUBLE)  # any attention
    outputs = torch.einsum("hnm,mhc->nhc", weights, values).flatten(1)
    made = FlatLlm(keep=3 / 8).fit(layers, {"o": gram(outputs)}, heads)
    ours = applied(made["v"], x).view(50, 2, 8).repeat_interleave(2, dim=1)
    assert not ours[..., 3:].any()
    ours = torch.einsum("hnm,mhc->nhc", weights, ours).flatten(1)
    expected = outputs @ layers["o"].weight.T + layers["o"].bias
    torch.testing.assert_close(applied(made["o"], ours), expected, rtol=1e-8, atol=1e-8)
    assert made["v"].num_params == 2 * 3 * 10 and made["o"].num_params == 12 * 4 * 3


def test_queries_are_the_best_rank_of_every_head_alone():
    torch.manual_seed(0)
    layer, x = Layer(torch.randn(24, 16, **DOUBLE), torch.randn(24, **DOUBLE)), torch.randn(40, 16, **DOUBLE)
    made = FlatLlm(keep=0.6).fit({"q": layer}, {"q": gram(x)}, Heads(3, 3, 8))["q"]
    assert torch.equal(made.bias, layer.bias)
    for ours, head in zip(made.to_dense().split(8), layer.weight.split(8), strict=True):
        alone = SvdLlm(keep=0.6).fit(head, gram(x)).to_dense()
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-9)
    assert made.num_params <= 0.6 * layer.weight.numel()


@pytest.mark.parametrize(
    ("keep", "shapes", "sentence"),
    [
        (0.01, {"up": (48, 32), "down": (32, 48)}, r"leaves none of 48 neurons; the smallest usable keep is 0\.0209"),
        (
            0.1,
            {"v": (16, 32), "o": (32, 32)},
            r"keep=0\.1 leaves none of 8 channels of a head; .* is 0\.1250, the large",
        ),
        (0.1, {"q": (32, 32)}, r"q: FlatLlm: keep=0\.1 leaves no rank for a 32x8 layer"),
        (0.5, {"v": (16, 32)}, r"flat_llm changes v, o together, but o is not among its sites"),
        (0.5, {"gate": (48, 32), "up": (48, 32)}, r"changes gate, up, down together, but down is not among its sites"),
        (0.5, {"down": (32, 48)}, r"flat_llm changes up, down together, but up is not among its sites"),
    ],
)
def test_what_cannot_be(keep, shapes, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlatLlm(keep=keep).empty(shapes, Heads(4, 2, 8))


@pytest.mark.parametrize("role", ["q", "o", "down"])
def test_inputs_without_any_variance_name_the_role(role):
    torch.manual_seed(0)
    shapes = {"q": (32, 16), "v": (16, 16), "o": (16, 32), "up": (40, 16), "down": (16, 40)}
    layers = {name: Layer(torch.randn(shape)) for name, shape in shapes.items()}
    stats = {name: gram(torch.randn(9, shape[1]) * (name != role)) for name, shape in shapes.items()}
    with pytest.raises(RoleError, match=f"{role}: the calibration inputs are all zero") as error:
        FlatLlm(keep=0.5).fit(layers, stats, Heads(4, 2, 8))
    assert error.value.role == role
