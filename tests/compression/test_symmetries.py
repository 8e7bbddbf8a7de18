"""Methods that fit layers together work where what lies between lets it pass, and are refused where it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tensormix.hf  # noqa: F401
from tensormix.allocation import allocate
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.plan import Plan
from tensormix.reparameterise import align_heads, sort_neurons, whiten_values
from tensormix.reparameterise.residual import find_stream
from tensormix.run.check import replace_empty
from tensormix.settings import Budget
from tensormix.sites import find_sites, locate_blocks
from tensormix.sites.families import FAMILIES, final_norm_of
from tensormix.sites.sliced import check_sliceable
from tensormix.sites.symmetries import Rows, neurons_pass, pairs_pass, values_pass
from tensormix.sites.turning import check_turns

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
FOUR: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MIXED: dict[str, Any] = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA: dict[str, Any] = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "phi3": ("phi3", SIZES),
    "granite": ("granite", SIZES),
    "gpt2": ("gpt2", GPT),
    "opt": ("opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": ("mixtral", SIZES),
    "gemma2": ("gemma2", {**SIZES, "layer_types": FOUR["layer_types"][:2]}),
    "diffllama": ("diffllama", SIZES),
    "bitnet": ("bitnet", SIZES),
    "qwen3_next": ("qwen3_next", {**SIZES, **MIXED, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_5_text": ("qwen3_5_text", {**SIZES, **MIXED}),
    "afmoe": ("afmoe", {**SIZES, **EXPERTS, "num_dense_layers": 1}),
    "gemma4": ("gemma4_text", {**SIZES, **GEMMA, "layer_types": FOUR["layer_types"][:2]}),
    "gemma3n": (
        "gemma3n_text",
        {**SIZES, **GEMMA, **FOUR, "num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 3
         + ["full_attention", "sliding_attention", "full_attention"], "laurel_rank": 4, "num_kv_shared_layers": 2,
         "activation_sparsity_pattern": [0.0] * 6},
    ),
}  # fmt: skip
BATCH = torch.randint(3, 61, (6, 24), generator=torch.Generator().manual_seed(0))
_made: dict[str, Any] = {}


def make(name: str) -> Any:
    if name not in _made:
        kind, sizes = CONFIGS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
                elif "norm" in path:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        _made[name] = model
    return copy.deepcopy(_made[name])


def rules(method: str, **where: Any) -> Plan:
    return Plan.model_validate([{**where, "method": {"name": method, "keep": 0.99}}])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(BATCH, use_cache=False).logits.double()


VALUES, NEURONS = {"sites": ["v", "o"]}, {"sites": ["gate", "up", "down"]}


@torch.no_grad()
def weaken(model: Any) -> None:
    """The last channel of each head of values is the first again, and the first neuron is always zero."""
    for site in find_sites(model):
        for tensor in () if site.kind != "linear" else (site.weight, site.bias):
            if tensor is None:
                continue
            if site.role == "v":
                heads = tensor.view(site.out_features // 8, 8, *tensor.shape[1:])
                heads[:, 7] = heads[:, 0]
            elif site.role in ("gate", "up", "gate_up"):
                tensor[:: site.out_features // (2 if site.role == "gate_up" else 1)] = 0


@pytest.mark.parametrize("method", ["flat_llm", "narrow"])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("llama", VALUES), ("llama", NEURONS), ("granite", VALUES), ("phi3", NEURONS), 
        ("gpt2", NEURONS), ("opt", VALUES), ("opt", NEURONS), ("mixtral", VALUES), ("qwen3_next", NEURONS),
        ("qwen3_5_text", NEURONS), ("gemma3n", {"blocks": "0", **VALUES}), ("gemma4", NEURONS),
    ],
)  # fmt: skip
def test_where_nothing_stands_between_the_small_form_is_exact(name, where, method):
    model = make(name)
    if name == "gemma3n" and method == "narrow":
        return  # which is refused below
    weaken(model)
    before = logits(model)
    method = {"name": method, "keep": 0.98 if where["sites"][0] == "gate" else 0.9}
    compress(model, Plan.model_validate([{**where, "method": method}]), [BATCH])
    assert float((logits(model) - before).norm() / before.norm()) < 2e-3


SHARED = {"blocks": "first 4", **VALUES}
REFUSED = [
    ("bitnet", VALUES, "flat_llm", ("layers.0.self_attn.v_proj", "attn_sub_norm", "svd_llm")),
    ("bitnet", NEURONS, "sola", ("layers.0.mlp.down_proj", "ffn_sub_norm", "svd_llm")),
    ("bitnet", {}, "narrow", ("ffn_sub_norm", "narrow for other sites")),
    ("qwen3_next", {"blocks": "1", **VALUES}, "flat_llm", ("layers.1.self_attn.o_proj", "gate", "svd_llm")),
    ("qwen3_5_text", {}, "narrow", ("layers.1.self_attn.o_proj", "gate", "narrow for other sites")),
    ("afmoe", VALUES, "flat_llm", ("layers.0.self_attn.gate_proj", "svd_llm")),
    ("diffllama", VALUES, "narrow", ("layers.0.self_attn.groupnorm", "svd_llm")),
    ("gemma3n", SHARED, "flat_llm", ("layers.2.self_attn.v_proj", "layers.4 reads them", "svd_llm")),
    ("gemma3n", {"blocks": "3", **VALUES}, "flat_llm", ("layers.3.self_attn.v_proj", "layers.5 reads them")),
    ("gemma3n", {"blocks": "0", **VALUES}, "narrow", ("layers.0.self_attn.v_norm",)),
    ("llama", {"sites": ["up", "down"]}, "flat_llm", ("mlp.gate_proj is not among", "gate, up, down")),
    ("qwen3_next", {"sites": ["up", "down"]}, "sola", ("gate_proj is not among", "gate, up, down")),
]


@pytest.mark.parametrize(("name", "where", "method", "said"), REFUSED)
def test_where_something_stands_between_it_is_refused_before_anything_changes(name, where, method, said):
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as refusal:
        compress(model, rules(method, **where), [BATCH])
    assert all(part in str(refusal.value) for part in said), refusal.value
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError) as foreseen:
        replace_empty(make(name).to("meta"), rules(method, **where))
    assert str(foreseen.value) == str(refusal.value)


def test_heads_of_another_size_in_some_blocks():
    """Of Gemma 4 the full attention has heads of its own size, which the config does not tell of the whole model."""
    model = make("gemma4")
    rows = compress(model, Plan.model_validate([{**VALUES, "method": {"name": "flat_llm", "keep": 0.75}}]), [BATCH])
    kept = {row["site"]: row["parameters"] / row["dense_parameters"] for row in rows}
    sizes = {module.head_dim for name, module in model.named_modules() if name.endswith("self_attn")}
    assert set(kept.values()) == {0.75} and len(kept) == 4 and len(sizes) == 2


def test_files_and_budgets_refuse_it_too(tmp_path):
    make("bitnet").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"ffn_sub_norm lies between"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", rules("narrow"), [BATCH])
    assert not (tmp_path / "out").exists()
    plan = Plan.model_validate([{**VALUES, "method": {"name": "flat_llm", "keep": 1.0}}])
    with pytest.raises(ValueError, match=r"attn_sub_norm lies between"):
        allocate(tmp_path / "dense", plan, Budget(keep=0.9, by="uniform"))


def test_a_rule_without_sites_leaves_out_what_has_no_partner():
    """The o of an attention without values of its own; of blocks of another kind, only what can be changed together."""
    model = make("gemma3n")
    plan = rules("sola", blocks="4,5")
    chosen = plan.resolve(find_sites(model), 6)
    assert {name.rpartition(".")[2] for name in chosen} == {"q_proj", "gate_proj", "up_proj", "down_proj"}


def part(model: Any, role: str, block: int = 0) -> Any:
    return next(site for site in find_sites(model) if site.role == role and site.block == block)


def rows_of(site: Any) -> Rows:
    return Rows(site.name, torch.arange(site.out_features))


def test_the_proof_knows_right_from_wrong():
    """With the heads as they are everything passes; cut at other places, or in other pairs, it does not."""
    model = make("llama")
    q, k, v, o = (part(model, role) for role in "qkvo")
    gate, up, down = (part(model, role) for role in ("gate", "up", "down"))
    for orthogonal in (True, False):
        assert values_pass(model, 0, rows_of(v), o.name, (4, 2, 8), orthogonal=orthogonal) is None
        assert values_pass(model, 0, rows_of(v), o.name, (2, 1, 16), orthogonal=orthogonal) is not None
    assert (
        neurons_pass(model, 1, [rows_of(part(model, role, 1)) for role in ("gate", "up")], part(model, "down", 1).name)
        is None
    )
    assert neurons_pass(model, 0, [rows_of(up)], down.name).beside == [gate.name]
    halves, neighbours = torch.arange(8).view(2, 4).T, torch.arange(8).view(4, 2)
    assert pairs_pass(model, 0, rows_of(q), rows_of(k), (4, 2, 8), halves) is None
    assert pairs_pass(model, 0, rows_of(q), rows_of(k), (4, 2, 8), neighbours) is not None


def test_a_model_without_a_twin_is_taken_at_its_word():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    assert neurons_pass(model, 0, [Rows("layers.0", torch.arange(4))], "layers.0") is None


def test_rewriting_is_refused_where_it_would_change_the_model():
    model = make("bitnet")
    before = logits(model)
    grams = {site.name: torch.eye(site.in_features) for site in find_sites(model) if site.kind == "linear"}
    for rewrite in (
        lambda: sort_neurons(model),
        lambda: align_heads(model, grams),
        lambda: whiten_values(model, grams),
    ):
        with pytest.raises(ValueError, match=r"sub_norm lies between .*nothing was changed"):
            rewrite()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "granite", "bitnet"])
def test_a_stream_that_is_only_added_to_may_be_turned_and_another_may_not(name):
    """Whatever a record says: of BitNet a norm of attention's output stands before a writer, which is no obstacle."""
    model = make(name)
    root, layers = locate_blocks(model)
    norms, writers = {}, {}
    for index, block in enumerate(layers):
        parts = [path for path, part in block.named_modules() if "norm" in path or path.startswith("ln_")]
        norms[index] = [f"{root}.{index}.{path}" for path in parts if "sub" not in path]
        writers[index] = [s.name for s in find_sites(model) if s.block == index and s.role in ("o", "down")]
    last = final_norm_of(model, root) or ""
    keeps_mean = name in ("gpt2", "opt")
    check_turns(model, norms, writers, last, keeps_mean=keeps_mean)
    short = {index: names[:-1] for index, names in writers.items()}
    with pytest.raises(ValueError, match=rf"{root}\.0: the residual stream of a .* cannot be turned"):
        check_turns(model, norms, short, last, keeps_mean=keeps_mean)
    if keeps_mean:
        with pytest.raises(ValueError, match="cannot be turned"):
            check_turns(model, {0: norms[0][:1], 1: norms[1]}, writers, last, keeps_mean=True)


def test_slicing_and_turning_look_at_the_twin(monkeypatch):
    """A record that is wrong of a class is found out before anything changes."""
    record = FAMILIES["LlamaDecoderLayer"]
    model = make("gemma2")
    monkeypatch.setitem(FAMILIES, "Gemma2DecoderLayer", record)
    for step in (check_sliceable, find_stream):
        with pytest.raises(ValueError, match=r"model\.layers\.0: the residual stream .* cannot be turned"):
            step(model)
