"""Free bases learned for given operators: the model stays what it was, and a new fit finds what was promised."""

from __future__ import annotations

import pytest
import torch

from tensormix.compression.observing import observe
from tensormix.methods import Mixt
from tensormix.reparameterise import learn_bases, rotate_residual
from tensormix.reparameterise.learned import orthogonal
from tensormix.sites import find_sites
from tensormix.statistics import Gram
from zoo import logits, make, token_ids

MIXT = Mixt(num_branches=2, init="aware")


def linear(model, block=1):
    return {site.name: site for site in find_sites(model) if site.kind == "linear" and site.block == block}


@torch.no_grad()
def refitted(model, names):
    """The root of the mean of the relative squared errors of new fits on the calibration tokens."""
    sites = {name: site for name, site in linear(model).items() if name in names}
    stats = {name: [{Gram: Gram(site.in_features)}] for name, site in sites.items()}
    with observe(model, sites, stats):
        model(token_ids())
    found = [MIXT.fit_with_facts(site.weight, stats[name][0])[1]["output_error"] for name, site in sites.items()]
    return (sum(error**2 for error in found) / len(found)) ** 0.5


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt", "gpt2"])
def test_a_new_fit_finds_what_was_promised_in_a_model_that_computes_the_same(family):
    """Norms with and without means, heads behind norms, q, k and v in one layer; all layers of one block."""
    model = make(family)
    before, methods = logits(model), dict.fromkeys(linear(model), MIXT)
    rotate_residual(model, torch.eye(32))  # the gains and shifts of the norms, which are not to be learned
    unlearned = refitted(model, methods)
    facts = learn_bases(model, methods, [token_ids()], steps=15)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    assert facts["error_before"] == pytest.approx(unlearned, rel=1e-2)
    assert facts["error_after"] < 0.95 * facts["error_before"]
    assert refitted(model, methods) < 1.01 * facts["error_after"]


def test_layers_that_are_mixtures_in_turned_bases_are_found_again():
    """The stream was turned away from a basis in which there is no error at all."""
    model = make("llama")
    sites = {name: site for name, site in linear(model).items() if site.role in ("gate", "up", "down")}
    with torch.no_grad():
        for site in sites.values():
            site.weight.copy_(Mixt(num_branches=2).fit(site.weight, {}).to_dense())
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotate_residual(model, orthogonal(0.05 * noise))
    assert refitted(model, sites) > 0.05
    facts = learn_bases(model, dict.fromkeys(sites, MIXT), [token_ids(), token_ids(8)], steps=200)
    assert facts["error_after"] < 1e-3 and refitted(model, sites) < 1e-3


@pytest.mark.parametrize(("family", "value"), [("llama", "v"), ("phi3", "qkv")])
def test_the_values_of_a_head_are_turned_where_they_are_a_layer(family, value):
    """W^T W of o does not change with a rotation of the stream, only with one of the heads."""
    model = make(family)
    out = model.model.layers[1].self_attn.o_proj
    old = out.weight.detach().clone()
    names = [f"model.layers.1.self_attn.{role}_proj" for role in (value, "o")]
    facts = learn_bases(model, dict.fromkeys(names, MIXT), [token_ids()], steps=15)
    assert facts["error_after"] < facts["error_before"]
    assert not torch.allclose(old.T @ old, out.weight.T @ out.weight, rtol=1e-2, atol=1e-2)


def test_what_is_wrong_is_said():
    model = make("llama")
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=r"for dense linear layers of the model, and was asked for lm_head"):
        learn_bases(model, {"lm_head": MIXT, name: MIXT}, [token_ids()])
    with pytest.raises(ValueError, match=r"was asked for nothing"):
        learn_bases(model, {}, [token_ids()])
    with pytest.raises(ValueError, match=r"learn_bases: there are no calibration batches"):
        learn_bases(model, {name: MIXT}, [])
    with pytest.raises(ValueError, match=r"is a Gemma2DecoderLayer: the residual stream can be turned where"):
        learn_bases(make("gemma2"), {name: MIXT}, [token_ids()])
