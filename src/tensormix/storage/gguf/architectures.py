"""The architectures of GGUF that are read: which class of transformers each is, and what its tensors are called there.

One record for each name that a file can give in `general.architecture`; what is not here is refused by name. The names
and the layouts are those of llama.cpp's converter.
"""

from __future__ import annotations

from dataclasses import replace

from tensormix.storage.gguf import layouts
from tensormix.storage.gguf.layouts import Layout
from tensormix.storage.gguf.record import Architecture

_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEAD = {"attention.key_length": "head_dim"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = {**_ATTENTION, "ffn_norm": "post_attention_layernorm", **_MLP}
_ROTARY: dict[str, Layout] = {"attn_q": layouts.query_rows, "attn_k": layouts.key_rows}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_NUM_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
_NORMS = "output_norm attn_norm ffn_norm post_attention_norm post_ffw_norm attn_q_norm attn_k_norm".split()
_GEMMA_NORMS: dict[str, Layout] = {name: layouts.norm_around_zero for name in _NORMS}
_GEMMA_BLOCK = {
    **_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **_MLP,
    "post_ffw_norm": "post_feedforward_layernorm",
}


_LLAMA = Architecture("llama", {**_SIZES, **_RMS, **_HEAD}, _DENSE, layouts=_ROTARY)
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_FALCON_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON = {"parallel_attn": True, "bias": False, "alibi": False}
_SEQUENTIAL = {"output_norm": "transformer.ln_f", "output": "lm_head"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "deci": _LLAMA,
    "llama with experts": Architecture(  # Mixtral goes by the name of llama
        "mixtral",
        {**_SIZES, **_RMS, **_HEAD, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        {
            **_ATTENTION,
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "block_sparse_moe.gate",
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        },
        layouts=_ROTARY,
    ),
    "granite": Architecture(
        "granite",
        {
            **_SIZES,
            **_RMS,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        _DENSE,
        layouts=_ROTARY,
    ),
    "smollm3": Architecture("smollm3", {**_SIZES, **_RMS}, _DENSE, layouts=_ROTARY),
    "qwen2": Architecture("qwen2", {**_SIZES, **_RMS, **_HEAD}, _DENSE),
    "qwen3": Architecture("qwen3", {**_SIZES, **_RMS, **_HEAD}, {**_DENSE, **_HEAD_NORMS}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        {
            **_SIZES,
            **_RMS,
            **_HEAD,
            **_NUM_EXPERTS,
            **_EXPERT_SIZE,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {
            **_ATTENTION,
            "ffn_norm": "post_attention_layernorm",
            **_EXPERTS,
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        layouts={"ffn_gate_inp_shexp": layouts.one_row},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {**_SIZES, **_RMS, **_HEAD, **_NUM_EXPERTS, **_EXPERT_SIZE},
        {**_ATTENTION, **_HEAD_NORMS, "ffn_norm": "post_attention_layernorm", **_EXPERTS},
        constants={"norm_topk_prob": True},  # as llama.cpp always does it
    ),
    "gemma": Architecture("gemma", {**_SIZES, **_RMS, **_HEAD}, _DENSE, layouts=_GEMMA_NORMS),
    "gemma2": Architecture(
        "gemma2",
        {
            **_SIZES,
            **_RMS,
            **_HEAD,
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _GEMMA_BLOCK,
        layouts=_GEMMA_NORMS,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {
            **_SIZES,
            **_RMS,
            **_HEAD,
            "attention.sliding_window": "sliding_window",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {**_GEMMA_BLOCK, **_HEAD_NORMS},
        layouts=_GEMMA_NORMS,
    ),
    "phi3": Architecture(
        "phi3",
        {**_SIZES, **_RMS, "attention.sliding_window": "sliding_window"},
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        rotary="part",
    ),
    "olmo2": Architecture(
        "olmo2",
        {**_SIZES, **_RMS},
        {
            **{name: there for name, there in _ATTENTION.items() if name != "attn_norm"},
            **_HEAD_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            **_MLP,
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "command-r": Architecture(
        "cohere",
        {**_SIZES, "attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
        {**_ATTENTION, **_HEAD_NORMS, **_MLP},
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {**_SIZES, "attention.layer_norm_epsilon": "norm_epsilon"},
        {
            **_ATTENTION,
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
    "stablelm": Architecture(
        "stablelm",
        {
            **_SIZES,
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        _DENSE,
        rotary="part",
    ),
    "nemotron": Architecture(
        "nemotron",
        {**_SIZES, "attention.layer_norm_epsilon": "norm_eps", "attention.layer_norm_rms_epsilon": "norm_eps"},
        {name: there for name, there in _DENSE.items() if name != "ffn_gate"},
        layouts=dict.fromkeys(("output_norm", "attn_norm", "ffn_norm"), layouts.norm_around_zero),
        rotary="part",
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        _GPT2_BLOCK,
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", **_SEQUENTIAL},
        "transformer.h",
        dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), layouts.transposed),
        rotary="none",
    ),
    "falcon": Architecture(
        "falcon",
        {
            "context_length": "max_position_embeddings",
            "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size",
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count": "num_attention_heads",
            "attention.head_count_kv": "num_kv_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        _FALCON_BLOCK,
        {"token_embd": "transformer.word_embeddings", **_SEQUENTIAL},
        "transformer.h",
        {"attn_qkv": layouts.groups_of_queries},
        constants=_FALCON,
    ),
    "bloom": Architecture(
        "bloom",
        {
            "block_count": "n_layer",
            "embedding_length": "hidden_size",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        {**_FALCON_BLOCK, "ffn_norm": "post_attention_layernorm"},
        {
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            **_SEQUENTIAL,
        },
        "transformer.h",
        {"attn_qkv": layouts.heads_of_thirds},
        rotary="none",
    ),
    "mamba": Architecture(
        "mamba",
        {
            "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
            "ssm.inner_size": "intermediate_size",
        },
        {
            "attn_norm": "norm",
            "ssm_in": "mixer.in_proj",
            "ssm_conv1d": "mixer.conv1d",
            "ssm_x": "mixer.x_proj",
            "ssm_dt": "mixer.dt_proj",
            "ssm_a": "mixer.A_log",
            "ssm_d": "mixer.D",
            "ssm_out": "mixer.out_proj",
        },
        {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
        "backbone.layers",
        {"ssm_conv1d": layouts.one_channel, "ssm_a": layouts.log_of_negative},
        rotary="none",
    ),
}

ARCHITECTURES["falcon with two norms"] = replace(
    ARCHITECTURES["falcon"],
    block={**ARCHITECTURES["falcon"].block, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
    constants={**_FALCON, "num_ln_in_parallel_attn": 2},
)
