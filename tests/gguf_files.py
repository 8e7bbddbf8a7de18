"""Tiny models written as GGUF the way llama.cpp's converter writes them: its names, its order of rows, its metadata.

The names are those of the package gguf, so that the project's own table of them is not tested against itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_SIZES, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}
_EXPERTS = {**_SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
_OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_SCALES = {"attention_multiplier": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}

# What a file may call its architecture, then anything that tells two apart -> the config, and keys of the metadata.
FAMILIES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama": (LlamaConfig(**_SIZES), {}),
    "llama biases": (LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), {}),
    "llama wide heads": (LlamaConfig(**_SIZES, head_dim=16), {}),
    "llama scaled": (LlamaConfig(**_SIZES | {"head_dim": 64}, rope_parameters=_LLAMA3), {}),
    "llama linear": (
        LlamaConfig(**_SIZES, rope_parameters=_LINEAR),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama experts": (MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2), {}),
    "granite": (
        GraniteConfig(**_SIZES, **_SCALES),
        {"attention.scale": 0.5, "embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 4.0},
    ),
    "smollm3": (SmolLM3Config(**_SIZES | {"num_hidden_layers": 4}), {}),
    "qwen2": (Qwen2Config(**_SIZES), {}),
    "qwen3": (Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True), {}),
    "qwen2moe": (
        Qwen2MoeConfig(**_EXPERTS, shared_expert_intermediate_size=64),
        {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3moe": (Qwen3MoeConfig(**_EXPERTS, head_dim=8, norm_topk_prob=True), {"expert_feed_forward_length": 32}),
    "gemma": (GemmaConfig(**_SIZES, head_dim=16), {}),
    "gemma2": (
        Gemma2Config(**_GEMMA),
        {"attention.sliding_window": 4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (Gemma3TextConfig(**_GEMMA | {"num_hidden_layers": 7}), {"attention.sliding_window": 4}),
    "phi3": (Phi3Config(**_SIZES), {"attention.sliding_window": 0}),
    "olmo2": (Olmo2Config(**_SIZES), {}),
    "command-r": (CohereConfig(**_SIZES, logit_scale=0.5), {"logit_scale": 0.5}),
    "starcoder2": (Starcoder2Config(**_SIZES), {}),
    "stablelm": (
        StableLmConfig(**_SIZES, use_qkv_bias=True),
        {"rope.dimension_count": 2, "use_parallel_residual": False},
    ),
    "nemotron": (NemotronConfig(**_SIZES), {"rope.dimension_count": 4}),
    "gpt2": (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64), {}),
    "falcon": (
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        {"attention.head_count_kv": 2},
    ),
    "bloom": (BloomConfig(**_OLD), {}),
    "mamba": (
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        {"ssm.conv_kernel": 4, "ssm.state_size": 4, "ssm.time_step_rank": 2, "ssm.inner_size": 64},
    ),
}
# Key of the metadata -> what classes of transformers call it.
_KEYS = {
    "vocab_size": ("vocab_size",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon"),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}

TOKENS = ["<pad>", "<s>", "</s>", "th", "\u0120", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ012.,!?"[:59]]
TOKENIZER: dict[str, Any] = {
    "ggml.model": "gpt2",
    "ggml.pre": "default",
    "ggml.tokens": TOKENS,
    "ggml.token_type": [3, 3, 3, *([1] * 61)],
    "ggml.merges": ["t h"],
    "ggml.bos_token_id": 1,
    "ggml.eos_token_id": 2,
    "ggml.eot_token_id": 0,
    "ggml.padding_token_id": 0,
    "chat_template": "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
}


def tiny(family: str) -> Any:
    """A random model, norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0], dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def write(model: Any, file: Path, family: str, kind: str = "F32", **changes: Any) -> None:
    """Write a model as GGUF; matrices whose rows are whole blocks in the type `kind`, all else in F32.

    `changes` are keys of the metadata, without the architecture, with a dot as two underscores.
    """
    arch, config = family.split()[0], model.config
    writer = gguf.GGUFWriter(file, arch)
    keys = {k: getattr(config, n) for k, names in _KEYS.items() for n in names if getattr(config, n, None) is not None}
    if arch == "mamba":
        keys = {key: keys[key] for key in ("block_count", "embedding_length", "vocab_size")}
        keys["attention.layer_norm_rms_epsilon"] = config.layer_norm_epsilon
    rope = getattr(config, "rope_parameters", None)
    if rope is not None:
        keys["rope.freq_base"] = rope.get("full_attention", rope)["rope_theta"]
    keys |= FAMILIES[family][1] | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in keys.items():
        add(writer, f"{arch}.{key}", value)
    for key, value in TOKENIZER.items():
        add(writer, f"tokenizer.{key}", value)
    for name, tensor in converted(model, arch).items():
        wanted = gguf.GGMLQuantizationType[kind]
        fits = tensor.dim() > 1 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        wanted = wanted if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def converted(model: Any, arch: str) -> dict[str, Tensor]:
    """The tensors of a model as they stand in a file, by their names there."""
    config = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found = {}
    for name, tensor in _on_disk(model).items():
        name = name.removeprefix("transformer.") if arch == "bloom" else name
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        found[new.removesuffix(".weight") if new.endswith(("ssm_a.weight", "ssm_d.weight")) else new] = _laid_out(
            tensor, name, arch, config
        ).contiguous()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _llama3(config.head_dim, rope)
    return found


def _on_disk(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` writes, with the experts of a block in one stack."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if not re.search(r"experts\.\d", name)}
    stacks: dict[str, list[Tensor]] = {}
    for name in sorted(tensors.keys() - plain.keys(), key=lambda name: [int(n) for n in re.findall(r"\.(\d+)", name)]):
        merged = re.sub(r"experts\.\d+", "experts", name).replace("model.layers", "layers")
        merged = merged.replace("block_sparse_moe", "feed_forward")
        merged = merged if "feed_forward" in merged else f"model.{merged}"
        stacks.setdefault(merged, []).append(tensors[name])
    return plain | {name: torch.stack(experts) for name, experts in stacks.items()}


def _laid_out(tensor: Tensor, name: str, arch: str, config: Any) -> Tensor:
    """One tensor as the converter changes it."""
    heads, keys = config.num_attention_heads if arch != "mamba" else 1, getattr(config, "num_key_value_heads", 1)
    if arch in ("llama", "granite", "smollm3") and re.search(r"\.[qk]_proj\.", name):
        count = heads if ".q_proj." in name else keys
        pairs = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)
    if (arch.startswith("gemma") or arch == "nemotron") and name.endswith("norm.weight"):
        return tensor + 1
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.t()
    if arch == "falcon" and "query_key_value" in name:
        keys = config.num_kv_heads
        groups = tensor.view(keys, heads // keys + 2, -1, *tensor.shape[1:])
        return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])
    if arch == "bloom" and "query_key_value" in name:
        thirds = tensor.view(heads, 3, -1, *tensor.shape[1:])
        return torch.cat([thirds[:, part].flatten(0, 1) for part in range(3)])
    if arch == "mamba":
        tensor = -tensor.exp() if name.endswith("A_log") else tensor
        return tensor.squeeze() if name.endswith("conv1d.weight") else tensor
    return tensor.squeeze(0) if "shared_expert_gate" in name else tensor


def _llama3(head_dim: int, rope: dict[str, Any]) -> Tensor:
    turns = 8192 * rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
