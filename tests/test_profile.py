"""Costs to the digit: the published counts, and torch's own counter."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from tensormix.compression import compress
from tensormix.models import load_model
from tensormix.operators import LowRank, Sum
from tensormix.plan import Plan
from tensormix.profile import (
    LiveBytes,
    bytes_on_disk,
    latencies,
    macs_per_token,
    num_parameters,
    peak_memory,
    profile,
)
from tensormix.recipe import Recipe
from tensormix.run.check import check, counts, replace_empty
from zoo import ZOO

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=False,
)
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def mixt(last, padding="multiple", num_branches=4):
    return Plan.model_validate(
        [{"blocks": f"last {last}", "method": {"name": "mixt", "num_branches": num_branches, "padding": padding}}]
    )


@pytest.mark.parametrize(
    ("padding", "parameters", "macs", "block_parameters", "block_macs"),
    [
        ("power", 3_583_250_432, 5_448_400_896, 16_777_216, 134_217_728),
        ("multiple", 3_513_061_376, 4_886_888_448, 12_648_448, 101_187_584),
    ],
)
def test_llama_2_7b_to_the_digit(padding, parameters, macs, block_parameters, block_macs):
    """arXiv 2605.25344, Table 1, recounted: N_B = 17, N_T = 4, d = 2."""
    model = on_meta(LLAMA_2_7B)
    assert counts(model) == {
        "parameters": 6_738_415_616,
        "macs_per_token": 6_607_077_376,
        "bytes": {"float32": 26_953_662_464, "bfloat16": 13_476_831_232},
    }
    rows = replace_empty(model, mixt(17, padding))
    assert len(rows) == 17 * 7
    last = [row for row in rows if row["block"] == 31]
    assert sum(row["dense_parameters"] for row in last) == 202_375_168
    assert sum(row["parameters"] for row in last) == block_parameters
    assert sum(row["macs_per_token"] for row in last) == block_macs
    assert (num_parameters(model), macs_per_token(model)) == (parameters, macs)


@pytest.mark.parametrize(("padding", "parameters"), [("power", 6_235_665_408), ("multiple", 6_201_062_400)])
def test_qwen3_8b_to_the_digit(padding, parameters):
    model = on_meta(QWEN3_8B)
    assert num_parameters(model) == 8_190_735_360
    replace_empty(model, mixt(11, padding))
    assert num_parameters(model) == parameters


@pytest.mark.parametrize("family", ZOO)
def test_macs_are_those_of_torchs_own_counter(family):
    """All of a model's matrix products but the attention scores, which the counter books apart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(ZOO[family]), attn_implementation="eager").eval()
    compress(model, mixt(2, num_branches=2))
    num_tokens = 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(3, 50, (1, num_tokens)), use_cache=False)
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    counted = sum(count for op, count in flops.items() if "bmm" not in op)  # eager attention is the only bmm
    assert counted == 2 * num_tokens * macs_per_token(model)


def test_check_agrees_with_what_compress_really_makes(tiny):
    recipe = Recipe.model_validate(
        {"model": str(tiny), "plan": [{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}]}
    )
    foreseen = check(recipe)
    model = load_model(str(tiny), dtype="float32")
    assert counts(model) == foreseen["dense"]
    rows = compress(model, recipe.plan)
    assert counts(model) == foreseen["compressed"]
    shared = ("site", "parameters", "macs_per_token", "dense_parameters", "dense_macs_per_token")
    assert [[row[key] for key in shared] for row in rows] == [[row[key] for key in shared] for row in foreseen["sites"]]


def test_a_tied_head_is_multiplied_but_not_stored(tiny):
    model = load_model(str(tiny), dtype="float32")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    inside = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert macs_per_token(model) == inside + head.weight.numel()


def test_live_bytes_sees_what_lives_together():
    with LiveBytes() as mode:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1  # 8,000 together
        del first
        third = second * 2  # 8,000 again, not 12,000
    assert mode.peak == 8000
    assert mode.live == 8000
    del second, third


def test_live_bytes_counts_a_view_once():
    with LiveBytes() as mode:
        base = torch.zeros(1000)
        views = [base.view(10, 100), base[:10]]
    assert mode.peak == 4000
    del views


def test_peak_memory_grows_with_the_tokens_from_the_weights_on(tiny):
    model = load_model(str(tiny), dtype="float32")
    weights = 4 * num_parameters(model)
    few, many = (peak_memory(model, torch.zeros(1, n, dtype=torch.long)) for n in (8, 128))
    assert weights < few < many


def test_profile_puts_dense_beside_compressed(tiny):
    dense, compressed = load_model(str(tiny), dtype="float32"), load_model(str(tiny), dtype="float32")
    compress(compressed, mixt(4, num_branches=3))
    rows = profile({"dense": dense, "compressed": compressed}, {"dense": tiny}, tokens=(1, 8), repeats=3)
    resources = {row["model"]: row for row in rows if row["kind"] == "resources"}
    assert resources["compressed"]["parameters"] < resources["dense"]["parameters"]
    assert resources["compressed"]["macs_per_token"] < resources["dense"]["macs_per_token"]
    assert resources["dense"]["bytes_on_disk"] == sum(f.stat().st_size for f in tiny.glob("*.safetensors"))
    saved = 4 * resources["compressed"]["parameters"]
    assert saved < resources["compressed"]["bytes_on_disk"] < saved + 50_000  # and the headers
    timed = [row for row in rows if row["kind"] == "latency"]
    assert [(row["model"], row["tokens"]) for row in timed] == [
        ("dense", 1), ("compressed", 1), ("dense", 8), ("compressed", 8),
    ]  # fmt: skip
    assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in timed)
    for dense_row, row in zip(timed[::2], timed[1::2], strict=True):
        assert dense_row["speedup"] == 1
        assert row["speedup"] == pytest.approx(dense_row["median_ms"] / row["median_ms"])


def test_bytes_on_disk_are_those_of_the_dtype_that_runs(tiny):
    """A checkpoint stored in float32 and run in bfloat16 is counted in bfloat16, dense like compressed."""
    wide, narrow = (load_model(str(tiny), dtype=dtype) for dtype in ("float32", "bfloat16"))
    stored = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert bytes_on_disk(wide, tiny) == stored
    assert 0.45 * stored < bytes_on_disk(narrow, tiny) < 0.6 * stored


def test_a_model_is_measured_in_turn_with_its_rival(tiny):
    order = []
    model = load_model(str(tiny), dtype="float32")
    twin = load_model(str(tiny), dtype="float32")
    for name, one in (("a", model), ("b", twin)):
        one.register_forward_pre_hook(lambda *_, n=name: order.append(n))
    latencies({"a": model, "b": twin}, num_tokens=4, repeats=3)
    assert order == ["a", "b"] * 5


def test_what_an_operator_holds_is_counted_once():
    terms = [LowRank(8, 12, rank=2), LowRank(8, 12, rank=1)]
    model = nn.Sequential(Sum(terms=terms), nn.Linear(12, 4))
    assert macs_per_token(model) == 3 * (8 + 12) + 12 * 4
