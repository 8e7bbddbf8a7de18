"""Other weights, the same function: logits stay, weights do not."""

from __future__ import annotations

import pytest
import torch

from tensormix.reparameterise import align_heads, check_equal, sort_neurons
from tensormix.sites import find_sites
from tensormix.statistics import Gram
from tensormix.walk.fitting import observe
from zoo import ZOO, make, token_ids


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def grams(model):
    sites = {site.name: site for site in find_sites(model) if site.role == "v"}
    stats = {name: [{Gram: Gram(site.in_features)}] for name, site in sites.items()}
    with observe(model, sites, stats):
        logits(model)
    return {name: of_site[0][Gram].mean for name, of_site in stats.items()}


@pytest.mark.parametrize("family", ZOO)
def test_sorted_neurons_give_the_same_logits(family):
    """In fp64, where nothing but the order of sums differs: any lost bias or half of a fused layer would show."""
    model = make(family).double()
    before, old = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    names = sort_neurons(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    assert len(names) >= 2 * 4, "every block has at least two layers that changed"
    assert all(not torch.equal(old[f"{name}.weight"], model.get_parameter(f"{name}.weight")) for name in names)


@pytest.mark.parametrize("family", ZOO)
def test_aligned_heads_give_the_same_logits(family):
    """Grouped queries, biases and tied heads included; fused q, k and v are left alone."""
    model = make(family).double()
    before = logits(model)
    names = align_heads(model, grams(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    assert len(names) == (0 if family in ("phi3", "gpt2", "gpt_neox") else 2 * 4)


def test_the_values_of_a_head_are_uncorrelated_afterwards():
    model = make("llama").double()
    align_heads(model, grams(model))
    seen = grams(model)
    for site in find_sites(model):
        if site.role == "v":
            for rows in site.weight.split(8):
                moment = rows @ seen[site.name] @ rows.T
                assert (moment - moment.diagonal().diag()).abs().max() < 1e-9 * moment.diagonal().max()
                assert moment.diagonal().diff().max() <= 1e-12, "the largest first"


def test_sorted_neurons_are_like_their_neighbours():
    """Two kinds of neurons, mixed: afterwards one change of kind is left in the order."""
    model = make("llama").double()
    mlp, kinds = model.model.layers[0].mlp, torch.arange(48) % 2
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
            weight.mul_(0.1).add_(torch.where(kinds == 1, 1.0, -1.0)[:, None])
    sort_neurons(model)
    assert int((mlp.up_proj.weight.mean(1) > 0).int().diff().abs().sum()) == 1


def test_what_is_wrong_is_said():
    model = make("llama")
    with pytest.raises(ValueError, match=r"v_proj: align_heads needs the Gram matrix of its inputs"):
        align_heads(model, {})
    before = logits(model)
    check_equal(before, before + 1e-5 * before.std())
    with pytest.raises(ValueError, match=r"logits moved by 0\.5 of their standard deviation, allowed is 0\.001"):
        check_equal(before, before + 0.5 * before.std())
