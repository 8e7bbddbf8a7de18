"""Tucker over heads: exact at full rank, never worse than the cut HOSVD, and every count that the papers print.

Shape letters: D hidden size, H heads of queries, G of keys and values, C channels of a head.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

import tensormix
import zoo
from tensormix.fitting.hooi import full_hosvd, hooi
from tensormix.methods import TuckerAttention
from tensormix.methods.base import Heads, Layer
from tensormix.models import load_model
from tensormix.operators.tucker_heads import num_params
from tensormix.plan import Plan

D, C = 12, 4
DOUBLE = {"dtype": torch.float64}


def attention(heads: Heads, hidden: int = D) -> dict[str, Layer]:
    H, G, C = heads
    rows = {"q": H * C, "k": G * C, "v": G * C}
    layers = {role: Layer(torch.randn(O, hidden, **DOUBLE)) for role, O in rows.items()}
    return layers | {"o": Layer(torch.randn(hidden, H * C, **DOUBLE))}


def squared_error(layers, fitted) -> float:
    return sum(
        float((fitted[role].to_dense().detach() - layer.weight).square().sum()) for role, layer in layers.items()
    )


def owner_of(fitted):
    (owner,) = {view.owner for view in fitted.values()}
    return owner


@pytest.mark.parametrize("heads", [Heads(3, 3, C), Heads(4, 2, C), Heads(4, 1, C)], ids=str)
def test_nothing_is_lost_at_full_rank(heads):
    torch.manual_seed(0)
    layers = attention(heads, hidden=30)
    method = TuckerAttention(ranks=(29, C, 4))
    whole = full_hosvd(tensors(layers, heads))
    assert hooi(whole, (30, C, 4), 3, 0.0).energy == pytest.approx(whole.energy, rel=1e-12)
    # One direction of 30 less: what is lost is the least energy that any of them has in all four matrices.
    rows = torch.cat([t.flatten(1) for t in tensors(layers, heads)], dim=1)
    least = float(torch.linalg.svdvals(rows)[-1].square())
    if num_params(method.layout(shapes(layers), heads)[0], 30, C, (29, C, 4)) <= sum(
        layer.weight.numel() for layer in layers.values()
    ):
        assert squared_error(layers, method.fit(layers, {}, heads)) == pytest.approx(least, rel=1e-9)


def shapes(layers):
    return {role: tuple(layer.weight.shape) for role, layer in layers.items()}


def tensors(layers, heads):
    """The four matrices as (D, heads, C, parts), those of equally many heads together."""
    H, G, C = heads
    cut = {role: layers[role].weight.T.unflatten(1, (-1, C)) for role in "qkv"}
    cut["o"] = layers["o"].weight.unflatten(1, (H, C))
    groups = [("q", "k", "v", "o")] if H == G else [("q", "o"), ("k", "v")]
    return [torch.stack([cut[role] for role in group], dim=-1) for group in groups]


@pytest.mark.parametrize("heads", [Heads(3, 3, C), Heads(4, 2, C)], ids=str)
def test_what_has_these_ranks_is_found_again(heads):
    torch.manual_seed(1)
    planted = TuckerAttention(ranks=(3, 2, 2)).fit(attention(heads), {}, heads)
    layers = {role: Layer(view.to_dense().detach()) for role, view in planted.items()}
    fitted = TuckerAttention(ranks=(3, 2, 2)).fit(layers, {}, heads)
    total = sum(float(layer.weight.square().sum()) for layer in layers.values())
    assert squared_error(layers, fitted) < 1e-20 * total
    assert TuckerAttention(ranks=(2, 2, 2)).fit(layers, {}, heads)  # and fewer are fewer
    assert squared_error(layers, TuckerAttention(ranks=(2, 2, 2)).fit(layers, {}, heads)) > 1e-4 * total


@settings(deadline=None, max_examples=30)
@given(st.integers(1, D), st.integers(1, C), st.integers(1, 4), st.integers(0, 9))
def test_more_steps_hold_more_and_the_error_is_bounded(r, s, q, seed):
    torch.manual_seed(seed)
    heads = Heads(4, 2, C)
    layers = attention(heads)
    whole = full_hosvd(tensors(layers, heads))
    held = [hooi(whole, (r, s, q), steps, 0.0).energy for steps in (1, 2, 8)]
    assert held[0] <= held[1] * (1 + 1e-9) and held[1] <= held[2] * (1 + 1e-9)
    left_out = tails(whole, 0, r) + tails(whole, 2, s) + tails(whole, 3, q)
    assert whole.energy - held[2] <= left_out * (1 + 1e-9) + 1e-9


def tails(whole, mode: int, rank: int) -> float:
    """What a mode leaves out: the energy of all but its first `rank` directions."""
    return sum(float(core.movedim(mode, 0)[rank:].square().sum()) for core in whole.cores)


def test_a_wrong_pairing_of_factors_would_show():
    """The fitted product is the projection of the weight: it is orthogonal to what is lost."""
    torch.manual_seed(2)
    heads = Heads(4, 2, C)
    layers = attention(heads)
    fitted = TuckerAttention(ranks=(6, 3, 2)).fit(layers, {}, heads)
    kept = sum(float(view.to_dense().detach().square().sum()) for view in fitted.values())
    total = sum(float(layer.weight.square().sum()) for layer in layers.values())
    assert squared_error(layers, fitted) == pytest.approx(total - kept, rel=1e-9)


def test_the_count_of_the_paper():
    heads, square = Heads(32, 32, 128), (4096, 4096)
    made = TuckerAttention(ranks=(64, 4, 2)).empty(dict.fromkeys("qkvo", square), heads)
    assert owner_of(made).num_params == 279_048
    assert sum(view.num_params for view in made.values()) == 0


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("heads", [Heads(3, 3, C), Heads(4, 2, C)], ids=str)
def test_a_budget_is_kept_and_no_other_cut_holds_more(heads, keep):
    torch.manual_seed(3)
    layers = attention(heads)
    dense = sum(layer.weight.numel() for layer in layers.values())
    fitted = TuckerAttention(keep=keep, steps=1).fit(layers, {}, heads)
    owner = owner_of(fitted)
    assert owner.num_params <= keep * dense
    whole = full_hosvd(tensors(layers, heads))
    held = {
        ranks: sum(float(core[: ranks[0], :, : ranks[1], : ranks[2]].square().sum()) for core in whole.cores)
        for ranks in ((r, s, q) for r in range(1, D + 1) for s in range(1, C + 1) for q in range(1, 5))
        if num_params(owner.parts, D, C, ranks) <= keep * dense
    }
    assert held[owner.ranks] == pytest.approx(max(held.values()), rel=1e-12)


def test_the_published_orientation_cuts_the_rows_that_are_read():
    torch.manual_seed(4)
    heads = Heads(3, 3, C)
    layers = attention(heads)  # as wide as the stream: D = H C
    turned = {role: Layer(layer.weight.T if role != "o" else layer.weight) for role, layer in layers.items()}
    published = TuckerAttention(ranks=(5, 2, 2), orientation="published").fit(layers, {}, heads)
    upright = TuckerAttention(ranks=(5, 2, 2)).fit(turned, {}, heads)
    assert squared_error(layers, published) == pytest.approx(squared_error(turned, upright), rel=1e-6)


def tensors_in(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3"])
def test_models_streamed_and_in_memory_and_loaded_again(tmp_path, family):
    model = zoo.make(family)
    model.save_pretrained(tmp_path / "dense")
    plan = Plan.model_validate(
        [{"blocks": "1-2", "sites": ["q", "k", "v", "qkv", "o"], "method": {"name": "tucker_heads", "keep": 0.5}}]
    )
    rows = tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", plan)
    small = load_model(tmp_path / "dense")
    dense = sum(p.numel() for p in small.parameters())
    tensormix.compress(small, plan)
    small.save_pretrained(tmp_path / "memory")
    one, other = (tensors_in(tmp_path / folder) for folder in ("streamed", "memory"))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    again = load_model(tmp_path / "streamed")
    x = zoo.token_ids()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, small(x).logits)
    assert sum(p.numel() for p in again.parameters()) < dense and rows


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TuckerAttention(), ("keep", "ranks")),
        (lambda: TuckerAttention(ranks=(13, 4, 4)).empty(EVEN, Heads(3, 3, C)), ("1..12", "13")),
        (lambda: TuckerAttention(ranks=(5, 5, 4)).empty(EVEN, Heads(3, 3, C)), ("1..4", "got 5")),
        (lambda: TuckerAttention(ranks=(12, 4, 4)).empty(EVEN, Heads(3, 3, C)), ("752", "576", "is 9")),
        (lambda: TuckerAttention(keep=0.01).empty(EVEN, Heads(3, 3, C)), ("keep=0.01", "0.039931")),
        (lambda: TuckerAttention(keep=0.5).empty({"q": (12, 12), "v": (12, 12)}, Heads(3, 3, C)), ("k, o",)),
        (
            lambda: TuckerAttention(keep=0.5, orientation="published").empty(
                {"q": (16, 12), "k": (8, 12), "v": (8, 12), "o": (12, 16)}, Heads(4, 2, C)
            ),
            ("4 heads", "2 of keys", "orientation: heads"),
        ),
    ],
)
def test_errors_say_what_is_possible(make, words):
    with pytest.raises((ValueError, ValidationError)) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value


EVEN = dict.fromkeys("qkvo", (12, 12))
