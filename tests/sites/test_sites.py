"""What every architecture calls its matrices, and what installing an operator leaves in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tensormix.operators import Bypass, LowRank, Zero
from tensormix.sites import ROLES, blocks, find_sites, install, is_conv1d, returns_of, role_of
from zoo import NUM_BLOCKS, ZOO, make, token_ids

LLAMA = ["q", "k", "v", "o", "gate", "up", "down"]
EXPECTED_ROLES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"), LLAMA),
    "phi3": ["qkv", "o", "gate_up", "down"],
    "opt": ["q", "k", "v", "o", "up", "down"],
    "gpt2": ["qkv", "o", "up", "down"],
    "gptj": ["q", "k", "v", "o", "up", "down"],
    "gpt_neox": ["qkv", "o", "up", "down"],
}


@pytest.fixture(params=ZOO, scope="module")
def family(request):
    return request.param


def linears(model):
    return [site for site in find_sites(model) if site.kind == "linear"]


def test_every_linear_layer_of_every_block_has_a_role(family):
    model = make(family)
    assert len(blocks(model)) == NUM_BLOCKS
    for index in range(NUM_BLOCKS):
        assert sorted(s.role for s in linears(model) if s.block == index) == sorted(EXPECTED_ROLES[family])
    assert set(EXPECTED_ROLES[family]) <= set(ROLES)


def test_block_sites_are_the_blocks(family):
    model = make(family)
    sites = [site for site in find_sites(model) if site.kind == "block"]
    assert [site.module for site in sites] == list(blocks(model))
    assert [site.block for site in sites] == list(range(NUM_BLOCKS))
    assert all(model.get_submodule(site.name) is site.module for site in sites)


def test_embeddings_and_head_are_never_sites(family):
    model = make(family)
    modules = {site.module for site in find_sites(model)}
    assert model.get_input_embeddings() not in modules
    assert model.get_output_embeddings() not in modules


@torch.no_grad()
def test_a_site_is_read_as_output_by_input(family):
    """x @ weight.T + bias is what the module computes, however it stores its weight."""
    for site in linears(make(family))[:8]:
        x = torch.randn(3, site.in_features)
        torch.testing.assert_close(F.linear(x, site.weight, site.bias), site.module(x))
        assert site.weight.shape == (site.out_features, site.in_features)


def test_gpt2_stores_its_weights_transposed():
    site = next(site for site in linears(make("gpt2")) if site.role == "up")
    assert is_conv1d(site.module)
    assert site.weight.shape == (128, 32) and site.module.weight.shape == (32, 128)


@torch.no_grad()
def test_install_keeps_the_bias(family):
    model = make(family)
    site = linears(model)[-1]
    x = torch.randn(3, site.in_features)
    expected = site.module(x)
    install(model, site.name, LowRank.from_dense(site.weight, rank=min(site.weight.shape)))
    torch.testing.assert_close(model.get_submodule(site.name)(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_install_adds_a_fitted_bias_to_that_of_the_site():
    model = make("opt")
    site = linears(model)[0]
    assert site.bias is not None
    operator = Zero(site.in_features, site.out_features)
    operator.bias = nn.Parameter(torch.ones(site.out_features))
    expected = site.bias + 1
    install(model, site.name, operator)
    assert torch.equal(model.get_submodule(site.name)(torch.randn(2, site.in_features))[0], expected)


def test_what_is_installed_is_no_site_any_more():
    model = make("llama")
    site = linears(model)[0]
    install(model, site.name, Zero(site.in_features, site.out_features))
    assert site.name not in {other.name for other in find_sites(model)}
    install(model, "model.layers.1", Bypass())
    assert {other.block for other in find_sites(model)} == {0, 2, 3}
    assert len(blocks(model)) == NUM_BLOCKS


def test_install_refuses_another_shape():
    model = make("llama")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj holds a 48x32 matrix, but the Zero .* is 32x48"):
        install(model, "model.layers.0.mlp.up_proj", Zero(48, 32))


def test_install_refuses_what_is_not_linear():
    model = make("llama")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp is a LlamaMLP, not a dense linear layer"):
        install(model, "model.layers.0.mlp", Zero(32, 32))


class Spelled(nn.Linear):
    """The same product, written out."""

    def forward(self, input):
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    """Codes that are multiplied by a scale."""

    def forward(self, input):
        return super().forward(input) * 0.1


class Tupled(nn.Linear):
    """The product and something else."""

    def forward(self, input):
        return super().forward(input), None


@pytest.mark.parametrize(("kind", "is_site"), [(Spelled, True), (Scaled, False), (Tupled, False)])
def test_a_subclass_of_linear_is_a_site_if_it_does_the_same(kind, is_site):
    model = make("llama")
    model.model.layers[0].mlp.up_proj = kind(32, 48)
    assert ("model.layers.0.mlp.up_proj" in {site.name for site in find_sites(model)}) == is_site


@torch.no_grad()
def test_blocks_return_what_we_say_they_return(family):
    model = make(family)
    seen = []
    handles = [block.register_forward_hook(lambda *call: seen.append(call[-1])) for block in blocks(model)]
    model(token_ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    assert [isinstance(out, tuple) for out in seen] == [
        returns_of(model, index) != "tensor" for index in range(len(blocks(model)))
    ]


def test_blocks_are_not_the_experts_inside_them():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in model.layers:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    assert blocks(model) is model.layers


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no list of decoder blocks"):
        blocks(nn.Sequential(nn.Linear(2, 2)))


def test_an_unknown_name_has_no_role():
    assert role_of("model.layers.0.mlp.something_else") is None
