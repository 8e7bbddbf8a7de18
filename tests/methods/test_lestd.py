"""Sparse Tucker cores: what is lost is what is cut, no other entries of that number lose less, refitted or not.

Shape letters: D hidden size, H heads of queries, G of keys and values, C channels of a head.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from pydantic import ValidationError

import tensormix
import zoo
from tensormix.fitting.hooi import full_hosvd, hooi
from tensormix.methods import LeStd, TuckerAttention
from tensormix.methods.base import Heads, Layer
from tensormix.models import load_model
from tensormix.operators import OPERATORS, SparseTuckerHeads, build
from tensormix.plan import Plan
from tensormix.storage.bits import stored_bits

D, C = 12, 4
DOUBLE = {"dtype": torch.float64}
GROUPINGS = [Heads(3, 3, C), Heads(4, 2, C)]


def attention(heads, hidden=D, seed=0):
    random = torch.Generator().manual_seed(seed)
    H, G, C = heads
    shapes = {"q": (H * C, hidden), "k": (G * C, hidden), "v": (G * C, hidden), "o": (hidden, H * C)}
    return {role: Layer(torch.randn(shape, generator=random, **DOUBLE)) for role, shape in shapes.items()}


def owner_of(fitted):
    (owner,) = {view.owner for view in fitted.values()}
    return owner


def squared_error(layers, fitted):
    return sum(
        float((fitted[role].to_dense().detach() - layer.weight).square().sum()) for role, layer in layers.items()
    )


def cores_of(owner):
    return [owner.whole_core(number).detach() for number in range(len(owner.groups))]


@pytest.mark.parametrize("heads", GROUPINGS, ids=str)
@pytest.mark.parametrize("density", [0.02, 0.25, 0.7])
def test_what_is_lost_is_what_is_cut(heads, density):
    """The error is that of dense cores at these ranks and the squares of the entries that are cut off."""
    layers, ranks = attention(heads), (7, 3, 2)
    dense = TuckerAttention(ranks=ranks).fit(layers, {}, heads)
    sparse = LeStd(ranks=ranks, density=density).fit(layers, {}, heads)
    cut = 0.0
    for whole, kept in zip(cores_of(owner_of(dense)), cores_of(owner_of(sparse)), strict=True):
        number = max(1, int(density * whole.numel() + 1e-6))
        assert int((kept != 0).sum()) == number
        cut += float(whole.square().flatten().sort(descending=True).values[number:].sum())
    assert squared_error(layers, sparse) == pytest.approx(squared_error(layers, dense) + cut, rel=1e-9)


def test_no_other_entries_of_that_number_lose_less_even_if_refitted():
    """All choices of two entries of a core, each with its best values by least squares."""
    heads, ranks = Heads(2, 2, 2), (2, 2, 1)
    layers = attention(heads, hidden=4, seed=3)
    fitted = LeStd(ranks=ranks, density=0.25).fit(layers, {}, heads)
    owner = owner_of(fitted)
    assert cores_of(owner)[0].numel() == 8
    wanted = torch.cat([layer.weight.flatten() for layer in layers.values()])
    columns = []
    for place in range(8):  # what the layers are when one entry of the core is 1
        owner.fill_core(0, torch.zeros(1, 8).index_fill(1, torch.tensor([place]), 1.0))
        columns.append(torch.cat([fitted[role].to_dense().detach().flatten() for role in layers]))
    fitted = LeStd(ranks=ranks, density=0.25).fit(layers, {}, heads)
    errors = []
    for pair in combinations(range(8), 2):
        some = torch.stack([columns[place] for place in pair], dim=1)
        found = torch.linalg.lstsq(some, wanted[:, None]).solution
        errors.append(float((wanted - (some @ found)[:, 0]).square().sum()))
    assert squared_error(layers, fitted) == pytest.approx(min(errors), rel=1e-9)


@pytest.mark.parametrize("heads", GROUPINGS, ids=str)
def test_with_all_entries_it_is_tucker_heads(heads):
    layers = attention(heads)
    methods = TuckerAttention(ranks=(5, 3, 2)), LeStd(ranks=(5, 3, 2), density=1.0)
    dense, sparse = (method.fit(layers, {}, heads) for method in methods)
    for role in layers:
        torch.testing.assert_close(sparse[role].to_dense(), dense[role].to_dense())


def test_what_has_few_entries_in_its_core_is_found_within_a_budget_that_dense_cores_miss():
    """Planted: full ranks, and 32 of 3,072 entries, no two of which share more than one of their places."""
    heads, random = Heads(4, 4, 8), torch.Generator().manual_seed(5)
    method = TuckerAttention(ranks=(8, 2, 1))
    parts, hidden, channels = method.layout(shapes_of(attention(heads, hidden=24)), heads)
    owner = method.operator(parts, hidden, channels, (24, 8, 4)).double()
    core = torch.zeros(4, 4, 8, 24, **DOUBLE)  # (Q, H, S, R)
    for h in range(4):
        for s in range(8):
            core[(h + s) % 4, h, s, (3 * s + h) % 24] = 1 + torch.rand((), generator=random, **DOUBLE)
    with torch.no_grad():
        for parameter in (owner.hidden, owner.channels, owner.part_0):
            parameter.copy_(torch.linalg.qr(torch.randn(parameter.shape, generator=random, **DOUBLE)).Q)
        owner.fill_core(0, core.flatten(1))
    layers = {role: Layer(view.to_dense().detach()) for role, view in owner.views("planted").items()}
    total = sum(float(layer.weight.square().sum()) for layer in layers.values())
    dense = TuckerAttention(keep=0.4).fit(layers, {}, heads)
    sparse = LeStd(keep=0.4, density=0.1).fit(layers, {}, heads)
    assert owner_of(sparse).num_params <= 0.4 * sum(layer.weight.numel() for layer in layers.values())
    assert squared_error(layers, sparse) < 1e-12 * total < squared_error(layers, dense)


def shapes_of(layers):
    return {role: tuple(layer.weight.shape) for role, layer in layers.items()}


@pytest.mark.parametrize("heads", GROUPINGS, ids=str)
@pytest.mark.parametrize(("keep", "density"), [(0.2, 0.1), (0.5, 0.25), (0.5, 1.0), (0.9, 0.5)])
def test_a_budget_is_kept_and_no_other_cut_holds_more(heads, keep, density):
    layers = attention(heads)
    dense = sum(layer.weight.numel() for layer in layers.values())
    method = LeStd(keep=keep, density=density, steps=1)
    owner = owner_of(method.fit(layers, {}, heads))
    assert owner.num_params <= keep * dense
    parts = owner.parts
    H, G, _ = heads
    cut = {role: layers[role].weight.T.unflatten(1, (-1, C)) for role in "qkv"}
    cut["o"] = layers["o"].weight.unflatten(1, (H, C))
    groups = [("q", "k", "v", "o")] if H == G else [("q", "o"), ("k", "v")]
    whole = full_hosvd([torch.stack([cut[role] for role in group], dim=-1) for group in groups])
    held = {
        ranks: sum(float(core[: ranks[0], :, : ranks[1], : ranks[2]].square().sum()) for core in whole.cores)
        for ranks in ((r, s, q) for r in range(1, D + 1) for s in range(1, C + 1) for q in range(1, 5))
        if method.count(parts, D, C, ranks) <= keep * dense
    }
    assert held[owner.ranks] == pytest.approx(max(held.values()), rel=1e-12)
    assert method.count(parts, D, C, owner.ranks) == owner.num_params
    assert hooi(whole, owner.ranks, 1, 0.0).energy >= held[owner.ranks] * (1 - 1e-12)


def test_the_operator_comes_back_from_its_spec():
    heads = Heads(4, 2, C)
    owner = owner_of(LeStd(ranks=(5, 3, 2), density=0.1).fit(attention(heads), {}, heads))
    again = build(owner.spec).double()
    again.load_state_dict(owner.state_dict())
    assert type(again) is SparseTuckerHeads is OPERATORS["SparseTuckerHeads"]
    for number, core in enumerate(cores_of(owner)):
        assert torch.equal(again.whole_core(number), core)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_models_streamed_and_in_memory_and_loaded_again(tmp_path, family):
    model = zoo.make(family)
    model.save_pretrained(tmp_path / "dense")
    plan = Plan.model_validate(
        [{"blocks": "1-2", "sites": ["q", "k", "v", "qkv", "o"], "method": {"name": "lestd", "keep": 0.5}}]
    )
    tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", plan)
    small = load_model(tmp_path / "dense")
    bits = stored_bits(small)
    tensormix.compress(small, plan)
    assert stored_bits(small) < bits
    small.save_pretrained(tmp_path / "memory")
    x = zoo.token_ids()
    with torch.no_grad():
        wanted = small(x).logits
        for folder in ("streamed", "memory"):
            assert torch.equal(load_model(tmp_path / folder)(x).logits, wanted)


EVEN = dict.fromkeys("qkvo", (12, 12))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LeStd(), ("lestd", "keep", "ranks")),
        (lambda: LeStd(keep=0.5, density=0.0), ("density", "greater than 0")),
        (lambda: LeStd(keep=0.5, density=1.5), ("density", "less than or equal to 1")),
        (lambda: LeStd(ranks=(13, 4, 4)).empty(EVEN, Heads(3, 3, C)), ("1..12", "13")),
        (lambda: LeStd(ranks=(12, 4, 4), density=1.0).empty(EVEN, Heads(3, 3, C)), ("lestd", "752", "576", "is 9")),
        (lambda: LeStd(keep=0.01).empty(EVEN, Heads(3, 3, C)), ("lestd: keep=0.01", "smallest usable keep is 0.0")),
        (lambda: LeStd(keep=0.5).empty({"q": (12, 12), "v": (12, 12)}, Heads(3, 3, C)), ("lestd", "k, o")),
        (
            lambda: SparseTuckerHeads(
                hidden_size=12, head_dim=4, parts=[("q", 3, True), ("k", 1, True)], ranks=(2, 2, 1), num_values=[3]
            ),
            ("2 groups", "got 1"),
        ),
        (
            lambda: SparseTuckerHeads(
                hidden_size=12, head_dim=4, parts=[("q", 3, True)], ranks=(2, 2, 1), num_values=[13]
            ),
            ("1..12", "13"),
        ),
    ],
)
def test_errors_say_what_is_possible(make, words):
    with pytest.raises((ValueError, ValidationError)) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value
