"""What a method that changes layers together cannot have is named, and nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch

import tensormix.hf  # noqa: F401
from joint_plans import BATCHES, BOTH, Same
from plans import one_rule
from tensormix.compression import compress
from tensormix.compression.layers import LayersUnit
from tensormix.plan import Plan
from tensormix.run.check import replace_empty
from tensormix.sites import blocks, find_sites
from zoo import make


@pytest.mark.parametrize(
    ("family", "rules", "sentence"),
    [
        (
            "llama",
            [{"sites": ["gate", "up"], "method": {"name": "flat_llm", "keep": 0.5}}],
            r"block 0: flat_llm changes gate, up, down together, but down is not among its sites",
        ),
        (
            "llama",
            [{"sites": ["v", "o"], "method": {"name": "flat_llm", "keep": 0.05}}],
            r"block 0: FlatLlm: keep=0\.05 leaves none of 8 channels .* the smallest usable keep is 0\.1250",
        ),
        (
            "llama",
            [{"sites": ["q"], "method": {"name": "flat_llm", "keep": 0.05}}],
            r"model\.layers\.0\.self_attn\.q_proj: FlatLlm: keep=0\.05 leaves no rank",
        ),
        (
            "phi3",
            [{"sites": ["q"], "method": {"name": "sola", "keep": 0.5}}],
            r"qkv_proj fuses q, k, v into one matrix: ask for all of them",
        ),
        (
            "deepseek_v3",
            [{"blocks": 1, "sites": ".*self_attn.*", "method": {"name": "flat_llm", "keep": 0.5}}],
            r"q_a_proj: flat_llm does not know this layer; it works on q, k, v, o, gate, up, down",
        ),
        (
            "llama",
            [{"method": {"name": "sola", "keep": 0.1}}],
            r"block 0: sola: keep=0\.1 cannot be met with prime=0\.15 and v dense: the smallest possible keep is",
        ),
    ],
)
def test_what_the_plan_cannot_have(family, rules, sentence):
    model = make(family)
    with pytest.raises(ValueError, match=sentence):
        compress(model, Plan.model_validate(rules), BATCHES)
    with pytest.raises(ValueError, match=sentence):
        replace_empty(model.to("meta"), Plan.model_validate(rules))


def group(model, method=None):
    sites = [site for site in find_sites(model) if site.block == 0 and site.kind == "linear"]
    return LayersUnit(model, method or BOTH.root[0].method, sites)


def test_heads_that_the_config_does_not_tell():
    model = make("llama")
    model.config.num_attention_heads = 8
    with pytest.raises(ValueError, match=r"o_proj: flat_llm needs 64 features there, for 8 heads \(2 of .* has 32"):
        group(model)
    model.config = None
    with pytest.raises(ValueError, match=r"the config of the model does not say how many heads it has"):
        group(model)


def test_an_unknown_layout_of_a_fused_projection():
    model = make("gpt2")
    model.transformer.h[0].__class__ = type("CodeGenBlock", (type(model.transformer.h[0]),), {})
    with pytest.raises(ValueError, match=r"c_attn: how q, k and v lie in it is not known; leave it out"):
        group(model)


def test_two_layers_of_one_role():
    model = make("llama")
    block = model.model.layers[0]
    block.second = copy.deepcopy(block.mlp)
    with pytest.raises(
        ValueError, match=r"second\.gate_proj: flat_llm takes one layer of each role .*mlp\.gate_proj is gate too"
    ):
        group(model)


def test_a_site_without_variance_or_with_nan_is_named_and_nothing_changes():
    model = make("llama")
    block = blocks(model)[1]
    with torch.no_grad():
        block.mlp.up_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: the calibration inputs are all zero"):
        compress(model, BOTH, BATCHES)
    assert block.self_attn.q_proj is find_sites(model)[9].module and type(block.mlp.down_proj) is torch.nn.Linear
    block.mlp.up_proj.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the weight holds NaN"):
        compress(model, BOTH, BATCHES)


class Broken(Same):
    """Its last operator is not finite."""

    name: str = "broken"

    def fit(self, layers, stats, heads):
        made = super().fit(layers, stats, heads)
        made["down"].matrix.data.fill_(torch.inf)
        return made


def test_what_is_not_finite_is_not_installed():
    model = make("llama")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: the fitted Dense holds NaN or infinite values"):
        compress(model, one_rule(Broken()), BATCHES)
    assert all(type(site.module) is torch.nn.Linear for site in find_sites(model) if site.kind == "linear")
    assert len(find_sites(model)) == 4 * 8
