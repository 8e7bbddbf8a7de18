"""Tiny random models of every supported family: four blocks, biases that are not zero, no downloads.

`ZOO` has the dense families, `MOE` those with a mixture of experts: four experts, of which a token visits two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 61
NUM_BLOCKS = 4
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA: dict[str, Any] = {
    **_LLAMA,
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GPT: dict[str, Any] = {**_IDS, "n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 64}

ZOO: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA),
    "qwen2": Qwen2Config(**_LLAMA),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=8, tie_word_embeddings=True),
    "mistral": MistralConfig(**_LLAMA, sliding_window=4),
    "gemma2": Gemma2Config(**_GEMMA),
    "gemma3": Gemma3TextConfig(**_GEMMA),
    "phi3": Phi3Config(**_LLAMA),
    "opt": OPTConfig(
        **_IDS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
        layerdrop=0.5,
    ),
    "gpt2": GPT2Config(**_GPT),
    "gptj": GPTJConfig(**_GPT, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(
        **_IDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
}

_LOCAL: dict[str, Any] = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN: dict[str, Any] = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

MOE: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**_QWEN, head_dim=8, norm_topk_prob=True),
    "mixtral": MixtralConfig(**_LOCAL),
    "gpt_oss": GptOssConfig(
        **_LOCAL,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**_LLAMA, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "qwen2_moe": Qwen2MoeConfig(**_QWEN, shared_expert_intermediate_size=40),
    "olmoe": OlmoeConfig(**_LLAMA, num_experts=4, num_experts_per_tok=2),
}


def make(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of `family` in evaluation mode, its biases filled: at zero they would hide a lost bias."""
    torch.manual_seed(seed)
    known = ZOO | MOE
    config = type(known[family]).from_dict({**known[family].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" not in name and "ln_" not in name:
                parameter.normal_(std=0.1)  # the usual 0.02 leaves attention nearly uniform
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # DeepSeek's routers choose experts with it
                buffer.normal_(std=0.1)
    return model


def token_ids(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(token_ids(seed=3)).logits


def load_saved(folder: Any, **options: Any) -> Any:
    """By transformers alone, which must have nothing to say about it."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model
