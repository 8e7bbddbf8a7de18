"""Experts as sites: how they are read, planned, and replaced, without ever being in memory twice."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from expert_models import DOWN, UP, logits, low_rank, open_all, site_at, stacks
from tensormix.operators import DenseStack, Experts, ExpertStack, Zero
from tensormix.plan import Plan
from tensormix.sites import dense_at, find_sites, install
from tensormix.sites.fused_experts import is_fused
from zoo import MOE, NUM_BLOCKS, make

WIDTH = {"mixtral": 48, "gpt_oss": 48, "olmoe": 48}  # of one expert; 24 elsewhere
ATTENTION = {
    **{family: ["q", "k", "v", "o"] for family in MOE},
    "deepseek_v3": [None, None, None, None, "o"],  # q_a, q_b, kv_a, kv_b: factors of q, and of k and v together
}
SHARED = {"deepseek_v3": ["gate", "up", "down"], "qwen2_moe": ["gate", "up", "down"]}


@pytest.fixture(params=MOE, scope="module")
def family(request):
    return request.param


def test_every_stack_of_every_block_is_a_site(family):
    model = make(family)
    dense = 1 if family == "deepseek_v3" else 0
    wanted = [f"model.layers.{i}.mlp.experts.{n}" for i in range(dense, NUM_BLOCKS) for n in ("gate_up", "down")]
    assert [site.name for site in stacks(model)] == wanted
    for site in stacks(model):
        assert site.role == site.name.rpartition(".")[2]
        assert (site.num_experts, site.experts_per_token) == (4, 2)
        width = WIDTH.get(family, 24)
        assert (site.out_features, site.in_features) == ((2 * width, 32) if site.role == "gate_up" else (32, width))
        assert site.weight.shape == (4, site.out_features, site.in_features)
        assert site.macs_per_token == 2 * site.weight[0].numel()


def test_what_else_is_a_site_in_a_block_with_experts(family):
    """Attention and shared experts are ordinary linear layers; routers are no sites, linear or not."""
    sites = [site for site in find_sites(make(family)) if site.block == 2 and site.kind == "linear"]
    assert [site.role for site in sites] == ATTENTION[family] + SHARED.get(family, [])
    assert not any(name in site.name for site in sites for name in ("router", "mlp.gate", "expert_gate"))


def test_a_router_that_is_a_linear_layer_is_no_site():
    model = make("mixtral")
    model.model.layers[0].mlp.router = nn.Linear(32, 4)
    assert not any("router" in site.name for site in find_sites(model))


def test_the_roles_of_deepseek_without_a_latent_query():
    sites = [site for site in find_sites(make("deepseek_v3", q_lora_rank=None)) if site.block == 0]
    assert [site.role for site in sites] == [None, "q", None, None, "o", "gate", "up", "down"]


def test_weights_are_views_of_what_the_model_holds(family):
    model = make(family)
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for site in stacks(model):
        for tensor in (site.weight, site.expert_weight(3), *([] if site.bias is None else [site.bias])):
            assert tensor.untyped_storage().data_ptr() in held and not tensor.requires_grad
        assert torch.equal(site.expert_weight(3), site.weight[3])
    linear = next(site for site in find_sites(model) if site.kind == "linear")
    assert (linear.num_experts, linear.experts_per_token) == (1, 1)
    assert torch.equal(linear.expert_weight(0), linear.weight)


@torch.no_grad()
def test_a_stack_is_read_as_output_by_input(family):
    """What the fused module computes for expert 3 alone, from the weights and biases of the sites."""
    model = make(family)
    fused, (up, down) = model.model.layers[2].mlp.experts, stacks(model)[-4:-2]
    x = torch.randn(5, 32)
    biases = [None if site.bias is None else site.bias[3] for site in (up, down)]
    y = fused._apply_gate(F.linear(x, up.expert_weight(3), biases[0]))
    y = F.linear(y, down.expert_weight(3), biases[1])
    torch.testing.assert_close(fused(x, torch.full((5, 1), 3), torch.ones(5, 1)), y)
    assert (up.name, down.name) == (UP, DOWN)


@torch.no_grad()
def test_operators_of_full_rank_change_nothing(family):
    """Installed where the experts are still closed; a bias of the experts moves over."""
    model = make(family)
    expected = logits(model)
    for site in stacks(model):
        install(model, site.name, low_rank(site, min(site.weight.shape[1:])))
        assert site.name not in {other.name for other in find_sites(model)}
    assert not stacks(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    assert not model.model.layers[2].mlp.experts.training


def test_dense_experts_are_let_go_when_they_are_replaced():
    model = make("gpt_oss")
    fused = model.model.layers[2].mlp.experts
    dense = {name: weakref.ref(parameter) for name, parameter in fused.named_parameters()}
    del fused
    for name in (UP, DOWN):
        install(model, name, low_rank(site_at(model, name), 2))
    gc.collect()
    assert {name for name, parameter in dense.items() if parameter() is not None} == {
        "gate_up_proj_bias",
        "down_proj_bias",
    }


@torch.no_grad()
def test_one_stack_alone_can_be_replaced(family):
    model = make(family)
    install(model, UP, low_rank(site_at(model, UP), 3))
    names = [site.name for site in stacks(model)]
    assert UP not in names and DOWN in names
    experts = model.get_submodule("model.layers.2.mlp.experts")
    assert isinstance(experts, Experts) and list(experts.stacks) == ["gate_up", "down"]
    assert isinstance(experts.stacks["down"], DenseStack)
    assert is_fused(model.model.layers[3].mlp.experts), "what is not asked for stays fused"
    assert logits(model).isfinite().all()


@torch.no_grad()
def test_a_fitted_bias_is_added_to_that_of_the_experts():
    model = make("gpt_oss")
    site = site_at(model, UP)
    assert site.bias is not None and site.bias.shape == (4, 96)
    constants = [Zero(32, 96) for _ in range(4)]
    for number, constant in enumerate(constants):
        constant.bias = nn.Parameter(torch.full((96,), float(number)))
    expected = site.bias + torch.arange(4.0)[:, None]
    install(model, UP, ExpertStack.from_experts(constants))
    assert torch.equal(model.get_submodule(UP)(torch.randn(1, 32), 2)[0], expected[2])


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("operator", "sentence"),
    [
        (lambda: Zero(32, 48), rf"{UP} holds the matrices of 4 experts, but a Zero replaces only one; put 4 of them"),
        (
            lambda: ExpertStack(each=Zero(48, 32), num_experts=4),
            rf"{UP} holds a 48x32 matrix for each of 4 experts, but the ExpertStack .* is 32x48 for each of 4 experts",
        ),
        (
            lambda: ExpertStack(each=Zero(32, 48), num_experts=3),
            r"holds a 48x32 matrix for each of 4 experts, but .* is 48x32 for each of 3 experts",
        ),
    ],
)
def test_install_says_what_a_stack_needs_and_leaves_the_model_alone(operator, sentence, opened):
    model = make("qwen3_moe")
    if opened:
        open_all(model)
    before = model.model.layers[2].mlp.experts
    with pytest.raises(ValueError, match=sentence):
        install(model, UP, operator())
    assert model.model.layers[2].mlp.experts is before


def test_install_refuses_a_stack_where_there_is_none():
    model, stack = make("qwen3_moe"), ExpertStack(each=Zero(32, 48), num_experts=4)
    with pytest.raises(ValueError, match=r"o_proj is a Linear, not a dense stack of experts: nothing can be installed"):
        install(model, "model.layers.2.self_attn.o_proj", stack)
    install(model, UP, stack)
    with pytest.raises(ValueError, match=r"gate_up is a ExpertStack, not a dense stack of experts"):
        install(model, UP, ExpertStack(each=Zero(32, 48), num_experts=4))
    with pytest.raises(AttributeError):
        dense_at(model, "model.layers.2.mlp.experts.up")


def test_a_rule_for_linear_layers_is_one_for_experts(family):
    model = make(family)
    sites = find_sites(model)

    def chosen(**rule):
        plan = Plan.model_validate([{"blocks": 2, "method": {"name": "zero"}, **rule}])
        return set(plan.resolve(sites, NUM_BLOCKS))

    here = {site.name for site in sites if site.block == 2 and site.kind != "block"}
    assert chosen() == here and {UP, DOWN} <= here
    roles = chosen(sites=["q", "k", "v", "o", "gate", "up", "down"])
    assert roles == {site.name for site in sites if site.name in here and site.role is not None}
    assert chosen(sites=["gate_up"]) == {UP}
    assert chosen(sites=r".*experts\.down") == {DOWN}
    with pytest.raises(ValueError, match=r"experts.gate_up fuses gate, up into one matrix: ask for all of them"):
        chosen(sites=["up", "down"])
    blocks_only = Plan.model_validate([{"blocks": 2, "method": {"name": "drop_blocks"}}])
    assert list(blocks_only.resolve(sites, NUM_BLOCKS)) == ["model.layers.2"]
