"""What a few random tokens through a twin show is what the model does, for models that nobody wrote down.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import tensormix
import tensormix.hf
from tensormix.operators import Bypass
from tensormix.plan import Plan
from tensormix.sites import blocks, find_sites, returns_of
from tensormix.sites.calls import record_calls
from tensormix.sites.seen import seen_in
from tensormix.sites.sites import unknown_stacks
from tensormix.sites.through import Blocks, through
from tensormix.sites.twin import twin_of
from tensormix.statistics import Gram

IDS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SHARED = {
    "vocab_size_per_layer_input": 64, "head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "bamba": {**LLAMA, **MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**LLAMA, **MAMBA, "head_dim": 8, "mamba_d_ssm": 64},
    "gpt_neox_japanese": {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")},
    "openai-gpt": {**IDS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "falcon": {**IDS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 48},
    "mamba": {**IDS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 4, "time_step_rank": 4},
    "jamba": {**LLAMA, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
              "mamba_dt_rank": 4},
    "qwen3_next": {**LLAMA, **LINEAR, **MOE, "layer_types": ["linear_attention", "full_attention"] * 2},
    "gemma3n_text": {**LLAMA, **SHARED, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**LLAMA, **SHARED},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"] * 2},
    "hunyuan_v1_moe": {**LLAMA, "num_experts": 4, "moe_topk": 2, "head_dim": 8},
}  # fmt: skip


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**MODELS[kind])).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    return model


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:  # (B, T)
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_what_blocks_return_and_call_is_seen(kind):
    model, returned, called = make(kind), [], set()
    for index, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda *call, index=index: returned.append((index, call[-1])))
    for name, part in model.named_modules():
        if isinstance(getattr(part, "weight", None), nn.Parameter):
            part.register_forward_hook(lambda *call, name=name: called.add(name))
    with torch.no_grad():
        model.base_model(tokens(8), use_cache=False)
    for index, out in returned:
        said = returns_of(model, index)
        wanted = {1: "tuple of 1", 2: "tuple"}.get(len(out)) if isinstance(out, tuple | list) else "tensor"
        assert said == wanted
    sites = {site.name for site in find_sites(model) if site.kind == "linear"}
    assert sites and sites <= called
    left_out = {name for name in called - sites if is_matrix(model.get_submodule(name)) and inside_blocks(model, name)}
    routers = {name for name in left_out if "gate" in name or "router" in name}
    by_hand = {name for name in left_out if name.split(".")[-1] in ("correction_coefs", "prediction_coefs")}
    assert left_out == routers | by_hand


def is_matrix(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear)


def inside_blocks(model: nn.Module, name: str) -> bool:
    return name.startswith(f"{twin_of(model).root}.")


@pytest.mark.parametrize(("kind", "name"), [("mamba", "mixer.dt_proj"), ("jamba", "mamba.dt_proj")])
def test_weights_that_are_multiplied_by_hand_are_no_sites(kind, name):
    model = make(kind)
    assert any(found is not None and name in found.by_hand for found in seen_in(model))
    assert not any(site.name.endswith(name) for site in find_sites(model))
    tensormix.compress(model, Plan.model_validate([{"method": {"name": "svd_llm", "keep": 0.5}}]), [tokens()])
    model(tokens())


@pytest.mark.parametrize("kind", MODELS)
def test_the_walk_shows_methods_what_the_model_feeds(kind):
    """Gram matrices of the walk are those of hooks on the whole model; a walk that changes nothing passes them on."""
    model, x = make(kind), tokens()
    sites = [site for site in find_sites(model) if site.kind == "linear"]
    wanted = {site.name: Gram(site.in_features) for site in sites}
    watch(model, wanted, lambda: model.base_model(x))
    found = {site.name: Gram(site.in_features) for site in sites}
    watch(model, found, lambda: [part.pass_on("dense") for part in through(model, Blocks(), [x])])
    for name, gram in wanted.items():
        torch.testing.assert_close(found[name].sum, gram.sum, msg=name)


@torch.no_grad()
def watch(model: nn.Module, grams: dict[str, Gram], run: Any) -> None:
    def update(name: str) -> Any:
        return lambda _, args: grams[name].update(args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(update(name)) for name in grams]
    run()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "falcon"])
def test_generation_without_a_block_is_the_same_with_a_cache(kind):
    x, refused = tokens(1, 8), set()
    for index in range(4):
        model = make(kind)
        plan = Plan.model_validate([{"blocks": index, "method": {"name": "drop_blocks"}}])
        try:
            tensormix.compress(model, plan)
        except ValueError as error:
            assert f"layers.{index}" in str(error) and "needs" in str(error)
            refused.add(index)
            continue
        out = [model.generate(x, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (False, True)]
        assert torch.equal(*out), index
    assert refused == ({0, 1} if kind.startswith("gemma") else set())


GRIFFIN = {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "sizes", "part"),
    [
        ("big_bird", {"is_decoder": True}, "set_attention_type"),
        ("recurrent_gemma", GRIFFIN, "temporal_block"),
    ],
)
def test_blocks_that_the_model_reaches_into_cannot_be_left_out(kind, sizes, part):
    """BigBird tells its blocks how to attend, RecurrentGemma makes their caches."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**LLAMA, **sizes)).eval()
    with pytest.raises(ValueError, match=part):
        tensormix.compress(model, Plan.model_validate([{"blocks": 1, "method": {"name": "drop_blocks"}}]))
    tensormix.compress(model, Plan.model_validate([{"blocks": 1, "method": {"name": "svd", "keep": 0.5}}]))


def test_what_a_model_fills_in_its_blocks_when_it_is_loaded_has_a_place(tmp_path):
    model, x = make("falcon_h1"), tokens()
    tensormix.compress(model, Plan.model_validate([{"blocks": 1, "method": {"name": "drop_blocks"}}]))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_blocks_that_read_and_those_they_read_are_left_out_together():
    """Without the readers nobody misses the keys and values."""
    model = make("gemma4_text")
    plan = Plan.model_validate([{"blocks": "0,2", "method": {"name": "drop_blocks"}}])
    tensormix.compress(model, plan)
    assert isinstance(blocks(model)[0], Bypass) and torch.isfinite(model(tokens()).logits).all()


def test_keys_and_values_of_one_stream_stay_in_it():
    """Where blocks share them, the dense stream beside a changed one sees what the dense model does."""
    model, x = make("gemma4_text"), tokens()
    with torch.no_grad():
        wanted = model.base_model(x, output_hidden_states=True).hidden_states
        for part in through(model, Blocks(), [x], streams=("dense", "propagated")):
            part.pass_on("dense")
            assert part.is_last or torch.allclose(part.hidden["dense"][0], wanted[part.span.stop], atol=1e-5)
            for projection in ("k_proj", "v_proj"):
                if hasattr(part.modules[0].self_attn, projection):
                    part.modules[0].self_attn.get_submodule(projection).weight.zero_()


def test_a_block_that_hands_on_more_is_refused_by_its_place():
    sizes = {**LLAMA, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 1,
             "router_hidden_size": 8}  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["zaya"](**sizes)).eval()
    assert not [s for s in find_sites(model) if "router" in s.name]
    for rule in ({"method": {"name": "svd_llm", "keep": 0.5}}, {"blocks": 0, "method": {"name": "drop_blocks"}}):
        with pytest.raises(ValueError, match="next block"):
            tensormix.compress(model, Plan.model_validate([rule]), [tokens()])
    tensormix.compress(model, Plan.model_validate([{"method": {"name": "svd", "keep": 0.5}}]))


@pytest.mark.parametrize("depth", [1, 4, 6])
def test_the_language_model_is_compressed_and_not_the_vision_tower(depth):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    tower = {"depth": depth, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
             "patch_size": 4, "fullatt_block_indexes": [0]}  # fmt: skip
    config = CONFIG_MAPPING["qwen2_5_vl"](
        text_config={**LLAMA, "rope_parameters": rope}, vision_config=tower, image_token_id=6, video_token_id=7
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    names = {site.name for site in find_sites(model)}
    assert names and all("language_model.layers" in name and "visual" not in name for name in names)
    text = tokens().clamp(min=10)
    tensormix.compress(model, Plan.model_validate([{"method": {"name": "svd_llm", "keep": 0.5}}]), [text])
    assert torch.isfinite(model(input_ids=text).logits).all()


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
def test_models_of_real_sizes_are_seen_without_their_memory(kind):
    """Some hundred million numbers a block, in seconds; nothing is drawn for a weight but a row."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](num_hidden_layers=3, vocab_size=512))
    assert seen_in(model) is not None and returns_of(model, 0) == "tensor"


def test_blocks_are_those_of_the_text_where_the_model_names_no_decoder():
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
             "image_size": 8, "patch_size": 4}  # fmt: skip
    config = CONFIG_MAPPING["git"](**LLAMA, vision_config=tower)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert all("image" not in site.name for site in find_sites(model))


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("phi", {"q", "k", "v", "o", "up", "down"}),
        ("lfm2", {"q", "k", "v", "o", "gate", "up", "down", "in", "out"}),
        ("modernbert-decoder", {"q", "k", "v", "o", "gate_up", "down"}),
        ("afmoe", {"q", "k", "v", "o", "gate", "up", "down", None}),
        ("rwkv", {"in", "out", "up", "down", None}),
    ],
)
def test_roles(kind, roles):
    sizes = {**LLAMA, **({"layer_types": ["conv", "full_attention"] * 2} if kind == "lfm2" else {})}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    assert {site.role for site in find_sites(model) if site.kind == "linear"} == roles


def test_a_tower_of_images_is_not_taken_for_the_language_model():
    """Though it has as many blocks, comes first, and the model names no decoder."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    sizes = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["git"](**sizes, vision_config=tower)).eval()
    names = {site.name for site in find_sites(model)}
    assert names and not any("image_encoder" in name for name in names)


def test_blocks_that_are_called_again_and_again_are_not_calibrated():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["hrm_text"](**LLAMA)).eval()
    with pytest.raises(ValueError, match=r"calls a block .* times for one text"):
        record_calls(model, [tokens()])


@pytest.mark.parametrize(("kind", "expected"), [("llama4_text", 8), ("qwen3_next", 0), ("mamba", 0), ("gpt_oss", 0)])
def test_stacks_of_a_form_of_their_own_are_named(kind, expected):
    sizes = MODELS.get(kind, {**LLAMA, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    found = unknown_stacks(model)
    assert len(found) == expected and all(name.startswith("model.layers.") for name in found)
