"""The walk over mixtures of experts: what it measures for each expert, and what it says of each stack."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tensormix.compression import compress
from tensormix.compression.kinds import MatrixUnit
from tensormix.compression.observing import observe
from tensormix.methods import MeanOutput, SvdLlm
from tensormix.operators import Experts
from tensormix.plan import Plan
from tensormix.run.check import counts, replace_empty
from tensormix.sites import find_sites
from tensormix.statistics import InputMean
from zoo import MOE, make, token_ids

UP, DOWN = "model.layers.2.mlp.experts.gate_up", "model.layers.2.mlp.experts.down"
METHODS = [{"name": "svd", "keep": 0.5}, {"name": "mean_output"}, {"name": "mixt", "num_branches": 2}]


def plan(method: dict, blocks: str = "last 2") -> Plan:
    return Plan.model_validate([{"blocks": blocks, "method": method}])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
@pytest.mark.parametrize("family", MOE)
def test_rows_are_those_foreseen_from_the_config(family, method):
    model = make(family)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(MOE[family]))
    foreseen = replace_empty(empty, plan(method))
    rows = compress(model, plan(method), [token_ids(), token_ids(seed=4)])
    json.dumps(rows, allow_nan=False)
    for key in ("site", "operator", "parameters", "dense_parameters", "macs_per_token", "dense_macs_per_token"):
        assert [row[key] for row in rows] == [row[key] for row in foreseen], key
    assert counts(model) == counts(empty)
    stacks = [row for row in rows if row["site"].endswith(("experts.gate_up", "experts.down"))]
    kind = "LowRankStack" if method["name"] == "svd" else "ExpertStack"
    assert [row["operator"] for row in stacks] == 4 * [kind]


@torch.no_grad()
def test_an_expert_sees_the_tokens_that_are_routed_to_it():
    """The mean input of each expert against the routing of the fused module itself."""
    model, seen = make("qwen3_moe"), []
    sites = {site.name: site for site in find_sites(model)}
    stats = MatrixUnit(model, MeanOutput(), [sites[UP]]).new_statistics(torch.float64)
    experts = model.get_submodule(UP.rpartition(".")[0])
    handle = experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
    model(token_ids())
    handle.remove()
    with observe(model, sites, stats):
        model(token_ids())
    ((hidden, index, _),) = seen
    for expert in range(4):
        mine = hidden[(index == expert).any(1)].double()
        assert stats[UP][expert][InputMean].num_tokens == len(mine)
        torch.testing.assert_close(stats[UP][expert][InputMean].sum, mine.sum(0), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, Experts) for module in model.modules())


def visit_two_experts(model) -> None:
    """A router that finds all experts equal: of equals, two are always the same ones."""
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight.zero_()


@torch.no_grad()
def test_experts_without_tokens_get_the_statistics_of_all_others():
    model = make("qwen3_moe")
    visit_two_experts(model)
    dense = copy.deepcopy(model)
    rows = compress(model, plan({"name": "mean_output"}, "2"), [token_ids()])
    row = next(row for row in rows if row["site"] == UP)
    idle = [expert for expert, tokens in enumerate(row["tokens_per_expert"]) if tokens == 0]
    assert len(idle) == 2 and sum(row["tokens_per_expert"]) == 2 * token_ids().numel()
    seen = []
    handle = dense.model.layers[2].mlp.experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
    dense(token_ids())
    handle.remove()
    weight = next(site for site in find_sites(dense) if site.name == UP).weight
    bias = model.get_submodule(UP).bias
    for expert in idle:
        torch.testing.assert_close(bias[expert], weight[expert] @ seen[0][0].mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_expert_is_fitted_to_its_own_inputs():
    model, method = make("mixtral"), SvdLlm(keep=0.5)
    batches = [token_ids(rows=8, seed=number) for number in range(3)]
    sites = {site.name: site for site in find_sites(model)}
    stats = MatrixUnit(model, method, [sites[UP]]).new_statistics(torch.float64)
    with observe(model, sites, stats):
        for batch in batches:
            model(batch)
    expected = [method.fit(sites[UP].expert_weight(e), stats[UP][e]).to_dense() for e in range(4)]
    compress(model, plan({"name": "svd_llm", "keep": 0.5}, "2"), batches)
    for expert, dense in enumerate(expected):
        torch.testing.assert_close(model.get_submodule(UP).expert_dense(expert), dense, rtol=1e-4, atol=1e-5)
    others = [method.fit(sites[UP].expert_weight(0), stats[UP][e]).to_dense() for e in range(1, 4)]
    assert all((other - expected[0]).abs().max() > 1e-3 for other in others)


def test_an_error_leaves_the_experts_closed():
    model = make("qwen3_moe")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"{DOWN}: the weight holds NaN or infinite values"):
        compress(model, plan({"name": "mean_output"}, "2"), [token_ids()])
    assert not any(isinstance(module, Experts) for module in model.modules())
