"""Fused experts come apart and together again, compute the same, and nothing is copied."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from expert_models import DOWN, UP, logits, open_all, site_at, stacks
from tensormix.operators import DenseStack, Experts
from tensormix.run.check import counts
from tensormix.sites import blocks, find_sites, opened
from tensormix.sites.fused_experts import close_experts, experts_per_token, is_fused, open_experts
from zoo import MOE, NUM_BLOCKS, make, token_ids


@pytest.fixture(params=MOE, scope="module")
def family(request):
    return request.param


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_opened_experts_compute_what_the_fused_ones_do(family, implementation):
    model = make(family)
    model.set_experts_implementation(implementation)
    expected, names, cost = logits(model), [s.name for s in find_sites(model)], counts(model)
    open_all(model)
    assert not any(is_fused(module) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert [site.name for site in find_sites(model)] == names
    assert counts(model) == cost


def test_opening_copies_nothing(family):
    model = make(family)
    before = {id(p) for p in model.parameters()}
    weights = {site.name: site.weight for site in stacks(model)}
    old_sites = stacks(model)
    open_all(model)
    assert {id(p) for p in model.parameters() if p.numel()} == before
    assert all(p.is_contiguous() for p in model.parameters()), "or a saved model would compute in another order"
    for site, old in zip(stacks(model), old_sites, strict=True):
        assert isinstance(site.module, DenseStack) and site.module is model.get_submodule(site.name)
        assert site.weight.data_ptr() == weights[site.name].data_ptr()
        assert torch.equal(site.weight, weights[site.name]) and torch.equal(old.weight, site.weight)


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True], ids=["fused", "opened before"])
def test_while_sites_are_opened_hooks_see_the_tokens_of_each_expert(family, before):
    model = make(family)
    if before:
        open_all(model)
    sites = [site_at(model, name) for name in (UP, DOWN, "model.layers.2.self_attn.o_proj")]
    kept, routed, seen = model.model.layers[2].mlp.experts, [], {}
    with opened(model, sites) as modules:
        assert list(modules) == [site.name for site in sites] and modules[sites[2].name] is sites[2].module
        assert is_fused(model.model.layers[3].mlp.experts) != before
        model.model.layers[2].mlp.experts.register_forward_pre_hook(lambda _, args: routed.append(args[1]))
        handle = modules[DOWN].register_forward_pre_hook(lambda _, args: seen.update({args[1]: args[0].shape}))
        model(token_ids())
        handle.remove()
    wanted = torch.bincount(routed[0].flatten(), minlength=4).tolist()
    assert sum(wanted) == 2 * token_ids().numel()
    assert seen == {e: (count, sites[1].in_features) for e, count in enumerate(wanted) if count}
    assert model.model.layers[2].mlp.experts is kept


def test_what_was_opened_is_closed_after_an_error_too():
    model = make("qwen3_moe")
    kept = model.model.layers[2].mlp.experts
    with pytest.raises(RuntimeError, match="stop"), opened(model, [site_at(model, UP)]):
        assert isinstance(model.model.layers[2].mlp.experts, Experts)
        raise RuntimeError("stop")
    assert model.model.layers[2].mlp.experts is kept


def test_only_fused_experts_can_be_opened():
    with pytest.raises(ValueError, match=r"layers.2.mlp is a Qwen3MoeSparseMoeBlock, not the fused experts of a block"):
        open_experts(make("qwen3_moe"), "model.layers.2.mlp")


def test_packed_experts_are_no_site():
    model = make("qwen3_moe")
    fused = model.model.layers[2].mlp.experts
    fused.down_proj = nn.Parameter(fused.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert not is_fused(fused) and UP not in {site.name for site in find_sites(model)}


def test_a_config_that_does_not_say_how_many_experts_a_token_visits_is_refused():
    with pytest.raises(ValueError, match=r"SimpleNamespace does not say how many experts .* num_experts_per_tok"):
        experts_per_token(SimpleNamespace(config=SimpleNamespace(moe_topk=[2, 2])))


def test_closing_gives_the_very_module_back(family):
    model = make(family)
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    open_all(model)
    for index in range(NUM_BLOCKS):
        if isinstance(getattr(blocks(model)[index].mlp, "experts", None), Experts):
            close_experts(model, f"model.layers.{index}.mlp.experts")
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert [name for name, _ in model.named_modules()] == names
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == parameters
    assert torch.equal(logits(model), expected)


def test_a_copy_of_an_opened_model_is_whole(family):
    model = make(family)
    open_all(model)
    twin = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    shell = twin.model.layers[2].mlp.experts.shell
    assert shell.config is twin.config and shell.config is not model.config


def fused_in_a_model(fused):
    """A model with nothing but one block with these experts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_()
    block = nn.Module()
    block.experts = fused
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["not gated", "norm after each expert", "transposed"])
def test_every_kind_of_fused_experts(kind):
    """The architectures whose experts differ from those of the zoo."""
    if kind == "not gated":
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Fused

        config = dict(n_routed_experts=5, moe_intermediate_size=12, moe_latent_size=None, mlp_hidden_act="relu2")
    elif kind == "transposed":
        from transformers.models.aria.modeling_aria import AriaExperts as Fused

        config = dict(moe_num_experts=5, intermediate_size=12, moe_topk=3, hidden_act="silu")
    else:
        from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts as Fused

        config = dict(num_local_experts=5, moe_hidden_size=8, moe_intermediate_size=12, hidden_act="silu")
        config |= dict(post_norm_eps=1e-6)
    config = dict(hidden_size=8, num_experts_per_tok=3, _experts_implementation="grouped_mm") | config
    model = fused_in_a_model(Fused(SimpleNamespace(**config)))
    fused = model.layers[0].experts
    x, index = torch.randn(9, 8), torch.stack([torch.randperm(5)[:3] for _ in range(9)])
    weights = torch.rand(9, 3)
    expected = fused(x, index, weights)
    names = [site.name for site in find_sites(model) if site.kind == "experts"]
    assert names == [f"layers.0.experts.{n}" for n in ("up" if kind == "not gated" else "gate_up", "down")]
    assert [site.role for site in find_sites(model)][1:] == [name.rpartition(".")[2] for name in names]
    experts = open_experts(model, "layers.0.experts")
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=1e-4, atol=1e-5)
    close_experts(model, "layers.0.experts")
    assert torch.equal(model.layers[0].experts(x, index, weights), expected)
