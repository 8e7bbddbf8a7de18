"""What experts cost, to the digit: all of them are stored, and a token pays for those that it visits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from expert_models import low_rank, stacks
from tensormix.operators import stack_of
from tensormix.plan import Plan
from tensormix.profile import num_parameters
from tensormix.run.check import counts, replace_empty
from tensormix.sites import find_sites, install, macs_per_token
from zoo import MOE, NUM_BLOCKS, make


@pytest.fixture(params=MOE, scope="module")
def family(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("compressed", [False, True])
def test_macs_are_those_of_torchs_own_counter(family, compressed):
    """Of the experts only those that a token visits; eager ones, because the counter does not see grouped_mm."""
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(MOE[family]), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    if compressed:
        for site in stacks(model)[:3]:
            install(model, site.name, low_rank(site, 2))
    num_tokens = 8
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(3, 50, (1, num_tokens)), use_cache=False)
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    counted = sum(count for op, count in flops.items() if "bmm" not in op)  # eager attention is the only bmm
    assert counted == 2 * num_tokens * macs_per_token(model)


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("config", "parameters", "macs"),
    [
        # 32 blocks of attention 41,943,040, router 32,768, two of eight experts 3 * 4096 * 14336; the head
        (MIXTRAL_8X7B, 46_702_792_704, 32 * (41_943_040 + 32_768 + 2 * 176_160_768) + 131_072_000),
        # 48 blocks of attention 18,874,368, router 262,144, 8 of 128 experts 3 * 2048 * 768; the head
        (QWEN3_30B_A3B, 30_532_122_624, 48 * (18_874_368 + 262_144 + 8 * 4_718_592) + 311_164_928),
    ],
    ids=["mixtral", "qwen3"],
)
def test_published_models_to_the_digit(config, parameters, macs):
    model = on_meta(config)
    assert counts(model) == {
        "parameters": parameters,
        "macs_per_token": macs,
        "bytes": {"float32": 4 * parameters, "bfloat16": 2 * parameters},
    }
    plan = Plan.model_validate(
        [{"blocks": "last 1", "sites": ["gate", "up", "down"], "method": {"name": "svd", "keep": 0.5}}]
    )
    rows = replace_empty(model, plan)
    assert [row["role"] for row in rows] == ["gate_up", "down"]
    for row in rows:
        rank = (row["in_features"] * row["out_features"]) // (2 * (row["in_features"] + row["out_features"]))
        each = rank * (row["in_features"] + row["out_features"])
        assert row["parameters"] == config.num_local_experts * each
        assert row["dense_parameters"] == config.num_local_experts * row["in_features"] * row["out_features"]
        assert row["macs_per_token"] == config.num_experts_per_tok * each
        assert row["num_experts"] == config.num_local_experts
    assert num_parameters(model) == parameters - sum(row["dense_parameters"] - row["parameters"] for row in rows)
    saved = sum(row["dense_macs_per_token"] - row["macs_per_token"] for row in rows)
    assert macs_per_token(model) == macs - saved


def test_what_check_foresees_is_what_installing_makes(family):
    method = {"name": "svd", "keep": 0.5}
    plan = Plan.model_validate([{"blocks": "last 2", "sites": ["gate", "up", "down"], "method": method}])
    foreseen = on_meta(copy.deepcopy(MOE[family]))
    rows = replace_empty(foreseen, plan)
    model = make(family)
    sites = {site.name: site for site in find_sites(model)}
    for name, one in plan.resolve(list(sites.values()), NUM_BLOCKS).items():
        fitted = [one.fit(sites[name].expert_weight(e), {}) for e in range(sites[name].num_experts)]
        install(model, name, stack_of(fitted) if sites[name].kind == "experts" else fitted[0])
    assert counts(model) == counts(foreseen)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in foreseen.named_parameters()}
    assert [row["num_experts"] for row in rows if row["role"] in ("gate_up",)] == [4, 4]


def test_check_names_the_stack_that_is_too_small():
    plan = Plan.model_validate([{"sites": ["down"], "method": {"name": "svd", "keep": 0.001}}])
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down: Svd: keep=0.001 leaves no rank for a 24x32"):
        replace_empty(on_meta(copy.deepcopy(MOE["qwen3_moe"])), plan)


def test_a_dropped_block_takes_its_experts_along():
    model = on_meta(copy.deepcopy(MOE["qwen3_moe"]))
    before = macs_per_token(model)
    rows = replace_empty(model, Plan.model_validate([{"blocks": 1, "method": {"name": "drop_blocks"}}]))
    assert rows[0]["num_experts"] is None
    assert macs_per_token(model) == before - rows[0]["dense_macs_per_token"]
    # attention 3072, router 128, two of four experts 3 * 32 * 24
    assert rows[0]["dense_macs_per_token"] == 3072 + 128 + 2 * 2304
