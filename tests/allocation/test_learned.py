"""Learned ranks: they find what a model does not need, and stay within the budget."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tensormix.allocation.learned import Training, _loss, learned
from tensormix.compression import compress
from tensormix.methods import DobiSvd
from tensormix.plan import Plan, Rule
from tensormix.sites import find_sites
from zoo import make, token_ids

RANKS = (8, 2, 8, 2)
NAMES = [f"layers.{index}.proj" for index in range(4)]
KEEP = sum(RANKS) * 32 / (4 * 16 * 16)  # what these ranks cost


class Block(nn.Module):
    def __init__(self, rank: int, width: int = 16) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        factors = torch.randn(width, rank) @ torch.randn(rank, width)
        self.proj.weight = nn.Parameter(factors * 0.4 / (width * rank) ** 0.5)

    def forward(self, hidden, **_):
        return hidden + self.proj(hidden)


class Planted(nn.Module):
    """Every second layer has rank 2, the others rank 8: the budget is enough if it is shared out so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block(rank) for rank in RANKS)
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, ids, **_):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return 2 * self.head(hidden)


@pytest.fixture(scope="module")
def planted():
    """The model, and text that it wrote itself: no model is better on it. Sequences are longer than layers are wide."""
    model, generator = Planted(), torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32, (8, 1), generator=generator)
    with torch.no_grad():
        for _ in range(47):
            ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1, generator=generator)], 1)
    return model, list(ids.split(2))


def cost(model, ranks, per_rank=sum):
    sites = {site.name: site for site in find_sites(model)}
    return sum(per_rank((sites[n].in_features, sites[n].out_features)) * rank for n, rank in ranks.items())


def compressed(ranks, batches):
    model = Planted().eval()
    rules = [Rule(sites=re.escape(name), method=DobiSvd(rank=rank)) for name, rank in ranks.items()]
    compress(model, Plan(tuple(rules)), batches)
    return model


def test_ranks_go_where_they_are_needed(planted):
    model, batches = planted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranks = learned(model.train(), NAMES, batches, KEEP)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert cost(model, ranks) <= KEEP * 4 * 256 < cost(model, ranks) + 32
    assert min(ranks[NAMES[0]], ranks[NAMES[2]]) >= 6 and max(ranks[NAMES[1]], ranks[NAMES[3]]) <= 4
    with torch.no_grad():
        models = [model.eval(), compressed(ranks, batches), compressed(dict.fromkeys(NAMES, 5), batches)]
        dense, ours, uniform = (sum(float(_loss(each, ids)) for ids in batches) for each in models)
    assert abs(ours - dense) < 0.3 * (uniform - dense)
    # It is left as it was.
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_seed_the_same_ranks(planted):
    model, batches = planted
    few = Training(steps=12, seed=3)
    assert learned(model, NAMES, batches, 0.5, training=few) == learned(model, NAMES, batches, 0.5, training=few)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("storage", ["plain", "remapped"])
def test_grouped_queries_tied_embeddings_biases_and_short_sequences(family, storage):
    """12 and 5 tokens in layers from 16 to 96 wide. The budget is met to the last rank."""
    model = make(family)
    sites = [site for site in find_sites(model) if site.kind == "linear"]
    steps: list[tuple[int, int]] = []
    ranks = learned(
        model, [site.name for site in sites], [token_ids(), token_ids(length=5)], 0.6, storage=storage,
        training=Training(steps=3), progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(1, 3), (2, 3), (3, 3)] and list(ranks) == [site.name for site in sites]
    per_rank = max if storage == "remapped" else sum
    budget = 0.6 * sum(site.weight.numel() for site in sites)
    assert cost(model, ranks, per_rank) <= budget < cost(model, ranks, per_rank) + 128
    for site in sites:
        if storage == "plain":
            DobiSvd(rank=ranks[site.name]).empty(site.in_features, site.out_features)


def test_a_budget_that_is_more_than_all_ranks_gives_all(planted):
    model, batches = planted
    assert set(learned(model, NAMES, batches, 1.0, training=Training(steps=2)).values()) == {7}


@pytest.mark.parametrize(
    ("names", "keep", "batches", "sentence"),
    [
        (["layers.9.proj"], 0.5, None, r"layers\.9\.proj is no site that is still dense"),
        (["layers.1"], 0.5, None, r"layers\.1 is a site of the kind 'block'"),
        ([], 0.5, None, "there are no sites"),
        (NAMES, 0.1, None, r"keep=0\.1 cannot be met: it must be from 0\.125 \(rank 1 each\) to 1"),
        (NAMES, 1.5, None, r"keep=1\.5 cannot be met"),
        (NAMES, 0.5, [], "need calibration batches of at least two tokens"),
        (NAMES, 0.5, [torch.zeros(2, 1, dtype=torch.long)], "need calibration batches of at least two tokens"),
    ],
)
def test_errors_say_what_is_allowed(planted, names, keep, batches, sentence):
    with pytest.raises(ValueError, match=sentence):
        learned(planted[0], names, planted[1] if batches is None else batches, keep)


def test_a_loss_that_is_not_finite():
    model = Planted()
    with torch.no_grad():
        model.head.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        learned(model, NAMES, [token_ids().clamp_max(31)], 0.5)
    assert not any(module._forward_hooks for module in model.modules())
    tiny = nn.Module()
    tiny.layers = nn.ModuleList([nn.Sequential(nn.Linear(1, 5))])
    with pytest.raises(ValueError, match=r"layers\.0\.0 is 1x5, too small for a rank; leave it out"):
        learned(tiny, ["layers.0.0"], [token_ids()], 0.5)
