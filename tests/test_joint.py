"""Layers that are changed together: in every architecture, in memory and streamed, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import tensormix.hf  # noqa: F401
from tensormix.methods import JointMethod, Svd
from tensormix.methods.neurons import dense, with_bias
from tensormix.models import load_model
from tensormix.plan import Plan
from tensormix.reparameterise import residual_basis, rotate_residual
from tensormix.run.check import counts, replace_empty
from tensormix.sites import blocks, find_sites
from tensormix.statistics import Gram, InputMean
from tensormix.streaming.stream import compress_checkpoint
from tensormix.walk import compress
from tensormix.walk.fitting import bytes_after
from tensormix.walk.joint import Group, groups_of
from zoo import ZOO, make, token_ids

BATCHES = [token_ids(rows=6, seed=seed) for seed in range(2)]
BOTH = Plan.model_validate(
    [
        {"blocks": "1", "method": {"name": "flat_llm", "keep": 0.7}},
        {"blocks": "2", "method": {"name": "narrow", "keep": 0.4, "width": 0.6}},
        {"blocks": "3", "method": {"name": "sola", "ranks": {"q": 5, "o": 6, "gate": 4, "up": 5, "down": 7}}},
    ]
)


class Same(JointMethod):
    """Changes nothing but the orders that it may: neurons, and channels inside the heads of values."""

    name: str = "same"
    needs = (Gram, InputMean)

    def needs_at(self, role):
        return {"k": (Gram,), "v": (InputMean,), "down": (Gram,)}.get(role, ())

    def empty(self, shapes, heads):
        return {role: dense(torch.empty(0), torch.empty(shape)) for role, shape in shapes.items()}

    def fit(self, layers, stats, heads):
        made = {}
        for role, layer in layers.items():
            weight, bias = layer.weight, layer.bias
            if role in ("gate", "up"):
                weight, bias = weight.flip(0), None if bias is None else bias.flip(0)
            if role == "v":
                weight = weight.unflatten(0, (heads.num_kv_heads, -1)).flip(1).flatten(0, 1)
                bias = None if bias is None else bias.view(heads.num_kv_heads, -1).flip(1).flatten()
            if role == "o":
                weight = weight.unflatten(1, (heads.num_heads, -1)).flip(2).flatten(1)
            if role == "down":
                weight = weight.flip(1)
            made[role] = with_bias(dense(weight, weight), bias)
        assert all(stats[role][kind].num_tokens for role, kind in (("k", Gram), ("v", InputMean), ("down", Gram)))
        assert stats["v"] is stats["k"] and "gate" not in stats
        return made


@torch.no_grad()
def logits(model):
    return model(token_ids(seed=9)).logits


def plan(method, **rule):
    return Plan.model_validate([{"method": method, **rule}])


@pytest.mark.parametrize("family", ZOO)
def test_parts_are_found_and_put_together_again(family):
    """Neurons and channels in another order, in every layout of every architecture: the model is the same."""
    model = make(family).double()
    dense_logits = logits(model)
    before = {site.role: site.weight.clone() for site in find_sites(model) if site.block == 2 and site.role}
    rows = compress(model, plan(Same()), BATCHES)
    after = {row["role"]: model.get_submodule(row["site"]).to_dense() for row in rows if row["block"] == 2}
    assert torch.equal(after["down"], before["down"].flip(1))
    assert {role for role in after if not torch.equal(after[role], before[role])} >= after.keys() - {"q", "k"}
    torch.testing.assert_close(logits(model), dense_logits, rtol=1e-10, atol=1e-10)
    linear = [site for site in find_sites(make(family)) if site.kind == "linear"]
    assert [(row["site"], row["role"]) for row in rows] == [(site.name, site.role) for site in linear]
    assert all(row["relative_error"] is None and row["bits"] == row["dense_bits"] for row in rows)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "opt"])
@pytest.mark.parametrize(
    "method",
    [{"name": "flat_llm", "keep": 1.0}, {"name": "sola", "keep": 1.0}, {"name": "narrow", "keep": 1.0}],
    ids=str,
)
def test_nothing_removed_is_the_model(family, method):
    model = make(family).double()
    dense_logits = logits(model)
    compress(model, plan(method), BATCHES)
    torch.testing.assert_close(logits(model), dense_logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2", "gpt_neox"])
def test_streamed_and_reloaded_to_the_bit(family, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense")
    expected = compress(model, BOTH, BATCHES)
    model.save_pretrained(tmp_path / "memory")
    rows = compress_checkpoint(tmp_path / "dense", tmp_path / "out", BOTH, BATCHES)
    for row, other in zip(rows, expected, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    for folder in ("memory", "out"):
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt_neox"])
def test_check_foresees_the_sizes(family):
    model, empty = make(family), make(family)
    foreseen = replace_empty(empty, BOTH)
    rows = compress(model, BOTH, BATCHES)
    for row, ahead in zip(rows, foreseen, strict=True):
        assert all(row[key] == ahead[key] for key in ("site", "operator", "parameters", "macs_per_token"))
    assert counts(model) == counts(empty)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_principal_basis_of_the_stream_makes_narrow_blocks_better(family):
    """A stream that lives in 8 of its channels' directions: where they come first, nothing beside them is missed."""
    model = make(family).double()
    torch.manual_seed(0)
    few = torch.randn(8, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.randn(model.config.vocab_size, 8, dtype=torch.float64) @ few)
        for site in find_sites(model):
            if site.role in ("o", "down"):
                site.weight.copy_(few.T @ torch.randn(8, site.in_features, dtype=torch.float64) / 30)
    theirs = logits(model)
    narrow = plan({"name": "narrow", "keep": 0.25, "width": 0.25}, sites=["gate", "up", "down"])
    turned = copy.deepcopy(model)
    rotate_residual(turned, residual_basis(turned, BATCHES))
    torch.testing.assert_close(logits(turned), theirs, rtol=1e-3, atol=1e-3)  # norms are taken in float32
    errors = []
    for each in (model, turned):
        seen: list[torch.Tensor] = []
        hook = blocks(each)[0].mlp.register_forward_hook(lambda _, args, out, seen=seen: seen.extend((args[0], out)))
        logits(each)
        hook.remove()
        compress(each, narrow, BATCHES)
        with torch.no_grad():
            errors.append(float((blocks(each)[0].mlp(seen[0]) - seen[1]).norm() / seen[1].norm()))
    assert errors[1] < 1e-3 and errors[0] > 0.1


def test_what_a_method_removes_has_a_dense_form():
    model = make("opt")
    compress(model, BOTH, BATCHES)
    before = logits(model)
    model.dequantize()
    assert type(blocks(model)[1].fc1) is torch.nn.Linear
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_the_same_as_without():
    model = make("qwen3")
    compress(model, BOTH, BATCHES)
    ids, options = token_ids(rows=1, seed=4), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_the_bytes_of_what_was_removed_are_foreseen():
    model = make("llama")
    sites = {site.name: site for site in find_sites(model)}
    chosen = BOTH.resolve(list(sites.values()), 4)
    empty = {n: op for group in groups_of(model, sites, chosen).values() for n, op in group.empty().items()}
    foreseen = {name: bytes_after(sites[name], method, empty) for name, method in chosen.items()}
    for row in compress(model, BOTH, BATCHES):
        assert 8 * foreseen[row["site"]] == row["bits"]


def test_statistics_are_gathered_once_where_inputs_are_the_same():
    model = make("llama")
    sites = {site.name: site for site in find_sites(model)}
    method = BOTH.root[0].method
    group = groups_of(model, sites, BOTH.resolve(list(sites.values()), 4))["model.layers.1.self_attn.q_proj"]
    short = {name.rpartition(".")[2]: kinds for name, kinds in group.needs().items()}
    assert short == {"q_proj": (Gram,), "o_proj": (Gram,), "down_proj": (Gram,)} and group.method == method


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
    return Group(model, method or BOTH.root[0].method, sites)


def test_heads_that_the_config_does_not_tell():
    model = make("llama")
    model.config.num_attention_heads = 8
    with pytest.raises(ValueError, match=r"q_proj: flat_llm needs 64 features there, for 8 heads \(2 of .* has 32"):
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


def test_an_earlier_rule_keeps_its_sites():
    rules = [{"sites": ["o"], "method": Svd(keep=0.5)}, {"sites": ["q", "k"], "method": {"name": "sola", "keep": 0.5}}]
    rows = compress(make("llama"), Plan.model_validate(rules), BATCHES)
    assert [(row["role"], row["method"]) for row in rows[:3]] == [("q", "sola"), ("k", "sola"), ("o", "svd")]


def test_fewer_tokens_than_features_and_bfloat16():
    model = make("qwen2").to(torch.bfloat16)
    compress(model, BOTH, [token_ids(rows=1, length=5)])
    assert logits(model).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


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
        compress(model, plan(Broken()), BATCHES)
    assert all(type(site.module) is torch.nn.Linear for site in find_sites(model) if site.kind == "linear")
    assert len(find_sites(model)) == 4 * 8
