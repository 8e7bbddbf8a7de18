"""Tiny random models of every class that writes text: the config's own defaults, with small numbers in its fields.

What a field means is told by its name. A list with one entry for each block keeps every kind of entry that it has, so
that hybrids stay hybrids. Whether a config stands is shown by a forward pass, not here.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

NUM_BLOCKS = 4
VOCABULARY = 64
NUM_EXPERTS = 6  # no other size is 6, so that a matrix with six outputs is a router

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "vocabulary_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "dim", "embed_dim", "emb_dim"), 64),
    **dict.fromkeys(("dim_model", "attention_hidden_size", "lru_width", "embedding_size", "embedding_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers"), NUM_BLOCKS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), NUM_BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "attention_head_dim", "swa_head_dim", "swa_v_head_dim", "d_kv"), 16),
    **dict.fromkeys(("global_head_dim", "qk_nope_head_dim", "dim_head", "head_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_dt_rank", "router_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "ffn_hidden_size", "d_ff"), 80),
    **dict.fromkeys(("dff", "dim_ff", "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_dim"), 80),
    **dict.fromkeys(("mlp_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "block_ff_dim"), 80),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 128),
    **dict.fromkeys(("max_sequence_length", "max_source_positions", "seq_length", "context_length"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "window_size"), 6),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_state_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    "num_kv_shared_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_ssm": 128, "adapter_dim": 16,
    "full_attention_interval": 2, "index_topk": 4, "index_n_heads": 2, "index_topk_freq": 2, "time_step_rank": 4,
    "image_size": 16, "patch_size": 4, "out_hidden_size": 64, "projection_dim": 64, "layerdrop": 0.0,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "moe_layer_start_index": 1, "moe_layer_end_index": 3,
    "max_window_layers": 2, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "qk_head_dim": 24,
    "cross_attention_layers": [1], "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3], "attn_layer_indices": [1],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_mamba_kernels": False, "is_decoder": True,
}  # fmt: skip

# What the names do not tell: by the type of the config.
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_HALF_MROPE = {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_TURNED = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "paddleocr_vl")
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{f"{kind}_text": {"rope_parameters": _MROPE, "rope_scaling": None} for kind in _TURNED},
    **{f"{kind}_text": {"rope_parameters": _HALF_MROPE} for kind in ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "roc_bert": {"shape_vocab_size": 32, "pronunciation_vocab_size": 32, "shape_embed_dim": 16,
                 "pronunciation_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "dots3_note_text": {"per_layer_config": {number: {
        "head_dim": 40, "kv_lora_rank": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24,
        "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 16} for number in ("1", "3")}},
    "deepseek_v4": {"o_lora_rank": 16, "o_groups": 2, "hc_sinkhorn_iters": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 4, "index_topk": 4},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "inkling2_vision": {"text_hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 50}},
    "emu3": {"vocabulary_map": {"<image>": 50}},
    "florence_vision": {"patch_size": [7, 3, 3, 3]},
    "molmo2_vision": {"image_size": [16, 16]},
    "molmo2_adapter": {"vision_feature_layer": [2, 1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "xlstm": {"chunk_size": 8, "qk_dim_factor": 1.0},
    "emu3_text_model": {"pad_token_id": 0},
    "musicgen_decoder": {"num_codebooks": 1, "audio_channels": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1, "audio_channels": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 4, "hc_lowrank": 8},
    "cohere_compass_text": {"layer_types": ["full_attention"] * NUM_BLOCKS, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 32},
}  # fmt: skip

_CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_WITH_IMAGES: dict[str, str] = {
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Tiny:
    """One class of models: the type of its config, and the name of its class in transformers."""

    kind: str
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.class_name}"

    @cached_property
    def config(self) -> Any:
        """A small one. Raises what transformers raises where there is none."""
        config = shrunk(CONFIG_MAPPING[self.kind])
        wanted = getattr(transformers, self.class_name).config_class
        if wanted is not None and not isinstance(config, wanted):
            config = config.get_text_config(decoder=True)
        config.architectures = [self.class_name]
        return config

    def make(self, dtype: torch.dtype = torch.float32) -> Any:
        """A random model in evaluation mode, the same at each call."""
        torch.manual_seed(0)
        model = getattr(transformers, self.class_name)._from_config(deepcopy(self.config), dtype=torch.float32)
        randomise(model)
        return model.eval().to(dtype)

    def tokens(self, rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:  # (B, T)
        """Ids of plain text: special ones lie at both ends of the vocabulary."""
        return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def every_class() -> list[Tiny]:
    """Every class for causal language models that transformers has, then those of images or sound and text."""
    pairs = dict.fromkeys([*_CAUSAL.items(), *_WITH_IMAGES.items()])
    return [Tiny(kind, name) for kind, name in pairs if kind in CONFIG_MAPPING]


def shrunk(cls: Any) -> Any:
    """A small config of `cls`. Parts (of text, of images) are made small each for itself."""
    base = cls()
    kind = getattr(cls, "model_type", "")
    plain = {key: value for key, value in vars(base).items() if not key.startswith("_")}
    fields = {key: value for key, value in SIZES.items() if key in plain or key in (cls.attribute_map or {})}
    if "attribute_map" in dir(cls):
        fields = {key: value for key, value in fields.items() if cls.attribute_map.get(key) not in fields}
    depth = next(
        (plain[key] for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if plain.get(key)), 0
    )
    for key, value in plain.items():
        if isinstance(value, list) and depth and len(value) == depth:
            fields.setdefault(key, _few(value))
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int) and key not in SIZES:
            fields.setdefault(key, 40 + len(fields) % 20)
    for key, part in (cls.sub_configs or {}).items():
        value = plain.get(key)
        known = type(value) if isinstance(value, transformers.PreTrainedConfig) else part
        if known is not None and hasattr(known, "model_type") and known.model_type:
            fields[key] = shrunk(known)
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # of latent attention it is the part that turns
    if "qk_rope_head_dim" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields = {**fields, **EXCEPTIONS.get(kind, {})}
    return _standing(cls, {key: value for key, value in fields.items() if value is not None})


def _few(entries: list[Any]) -> list[Any]:
    """NUM_BLOCKS entries in turn, of every kind that there is in `entries`."""
    kinds = [entry for number, entry in enumerate(entries) if entry not in entries[:number]]
    return [kinds[number % len(kinds)] for number in range(NUM_BLOCKS)]


def _standing(cls: Any, fields: dict[str, Any]) -> Any:
    """The config of these fields, or without some that contradict the others."""
    error: Exception | None = None
    for doubtful in ((), ("head_dim",), ("n_group", "topk_group"), ("num_key_value_heads",), ("is_decoder",)):
        try:
            return cls(**{key: value for key, value in fields.items() if key not in doubtful})
        except Exception as raised:
            error = error or raised
    raise error or AssertionError


@torch.no_grad()
def randomise(model: Any) -> None:
    """Random weights that keep the size of what passes them; gains and biases too, so that what lies between shows."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() >= 2:
            parameter.copy_(noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5))
        else:
            parameter.add_(noise * 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.normal_(std=0.1)
