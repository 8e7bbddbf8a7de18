"""All that is known of architectures: names that they share, and one record for each class of decoder blocks.

A block of a class without a record is compressed matrix by matrix all the same; what a record adds is in `Family`.
A new family is one record here and one line in the tests' zoo; docs/families.md says what each of them supports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# What a role is made of, for the architectures that multiply several projections at once.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
ROLES = ("q", "k", "v", "o", "gate", "up", "down", *FUSED)
READS = frozenset({"q", "k", "v", "qkv", "gate", "up", "gate_up"})  # the residual stream, through a norm
WRITES = frozenset({"o", "down"})  # and add to it

# Matched against the end of a matrix's name, in this order.
_ROLE_NAMES = (
    (r"\bq_proj", "q"),
    (r"\bk_proj", "k"),
    (r"\bv_proj", "v"),
    (r"\b(qkv_proj|c_attn|query_key_value|Wqkv)", "qkv"),
    (r"\b(o_proj|out_proj|(attn|attention)\.c_proj|(self_)?attention\.dense)", "o"),
    (r"\bgate_up_proj", "gate_up"),
    (r"^(?!.*(attn|attention)\.).*\bgate_proj", "gate"),  # of neurons, not of what attention puts out
    (r"\b(up_proj|fc1|fc_in|c_fc|dense_h_to_4h)", "up"),
    (r"\b(down_proj|fc2|fc_out|mlp\.c_proj|dense_4h_to_h)", "down"),
)
# How the rows of a fused qkv lie: head by head in turns, or all of q, then of k, then of v.
_QKV_TAKES_TURNS = {"query_key_value": True, "qkv_proj": False, "c_attn": False, "Wqkv": False}
# What decides where a token goes is small, and a small error there sends the token elsewhere.
_ROUTER = re.compile(r"router\b|\bshared_expert_gate$")
_HEAD_NORM = re.compile(r"(q|k|query|key)_?(layer_?)?norm$")
_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f")
EXPERT_WEIGHTS = {"gate_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}  # stack -> parameter, where fused
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # what configs call it

_SEQUENTIAL = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))


@dataclass(frozen=True)
class Family:
    """What is known of one class of decoder blocks.

    Attributes:
        halves: the norm and the part of each half of a block that does h + part(norm(h)) twice, attention before MLP,
            with root mean square norms and nothing else on the way: its residual stream can be sliced.
        norms: the norms through which alone a block reads the residual stream, which it only adds to, each with how
            the names of the layers begin that read what it hands on: its residual stream can be turned.
        pairs: how rotary positions pair the channels of a head: the first half with the second, each with its
            neighbour, or not at all. Without it, queries and keys stay as they are.
        returns_tuple: whether a block returns (hidden, attention weights) instead of the hidden state alone.
        mixes_qkv: whether the rows of its fused qkv lie in an order of their own.
    """

    halves: tuple[tuple[str, str], ...] = ()
    norms: Mapping[str, tuple[str, ...]] | None = None
    pairs: Literal["halves", "neighbours", "none"] | None = None
    returns_tuple: bool = False
    mixes_qkv: bool = False

    @property
    def stream_norms(self) -> Mapping[str, tuple[str, ...]]:
        """`norms`, or those of the halves."""
        return self.norms or {norm: (f"{part}.",) for norm, part in self.halves}


# By the class of a block, as of transformers 5.
FAMILIES: dict[str, Family] = {
    "LlamaDecoderLayer": Family(halves=_SEQUENTIAL, pairs="halves"),
    "MistralDecoderLayer": Family(halves=_SEQUENTIAL, pairs="halves"),
    "Phi3DecoderLayer": Family(halves=_SEQUENTIAL, pairs="halves"),
    "Qwen2DecoderLayer": Family(halves=_SEQUENTIAL, pairs="halves"),
    "Qwen3DecoderLayer": Family(halves=_SEQUENTIAL),
    "Gemma2DecoderLayer": Family(pairs="halves"),
    "OPTDecoderLayer": Family(
        norms={"self_attn_layer_norm": ("self_attn.",), "final_layer_norm": ("fc1",)}, pairs="none"
    ),
    "GPT2Block": Family(norms={"ln_1": ("attn.",), "ln_2": ("mlp.",)}, pairs="none"),
    "GPTJBlock": Family(norms={"ln_1": ("attn.", "mlp.")}, pairs="neighbours", returns_tuple=True),
    "GPTNeoXLayer": Family(
        norms={"input_layernorm": ("attention.",), "post_attention_layernorm": ("mlp.",)}, pairs="halves"
    ),
    "BloomBlock": Family(returns_tuple=True),
    "CodeGenBlock": Family(returns_tuple=True, mixes_qkv=True),
    "FalconDecoderLayer": Family(returns_tuple=True),
    "GPTNeoBlock": Family(returns_tuple=True),
    "MptBlock": Family(returns_tuple=True),
}


def family_of(block: nn.Module) -> Family:
    """The record of a block; one without special knowledge if its class has none."""
    return FAMILIES.get(type(block).__name__, Family())


def role_of(name: str) -> str | None:
    """The role of the matrix called `name`; None if the name is not one we know."""
    return next((role for pattern, role in _ROLE_NAMES if re.search(pattern + "$", name)), None)


def is_router(name: str) -> bool:
    return _ROUTER.search(name) is not None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the transposed linear layer of GPT-2, recognised by name so that transformers is not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_dense(module: nn.Module) -> bool:
    # Subclasses of nn.Linear (packed 4-bit weights, adapters) do not hold a plain (O, I) matrix.
    return type(module) is nn.Linear or is_conv1d(module)


def qkv_takes_turns(block: nn.Module, name: str) -> bool:
    """Whether the rows of the fused qkv called `name` take turns, head by head.

    Raises ValueError if the layout is not known.
    """
    turns = _QKV_TAKES_TURNS.get(name.rpartition(".")[2])
    if turns is None or family_of(block).mixes_qkv:
        raise ValueError(f"{name}: how q, k and v lie in it is not known; leave it out")
    return turns


def head_counts(model: nn.Module, block: int | None = None) -> tuple[int, int, int] | None:
    """How many heads the attention has for queries, how many for keys and values, and their size; None if unknown.

    Some models differ in that from block to block, so it is asked of one.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if block is not None and getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[block]
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if heads is None or width is None:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or width // heads


def norm_of_heads(block: nn.Module) -> str | None:
    """The name of a norm between a projection and its positions; None if there is none."""
    return next((name for name, _ in block.named_modules() if _HEAD_NORM.search(name)), None)


def has_norms_behind(block: nn.Module) -> bool:
    """Whether the norms come after attention and MLP, as in one size of OPT."""
    return getattr(block, "do_layer_norm_before", True) is False


def final_norm_of(model: nn.Module, root: str) -> str | None:
    """The name of the norm after the blocks, which are called `root`.

    None if none is known, or the residual stream is projected from embeddings of another width.
    """
    path = root.rpartition(".")[0]
    owner = model.get_submodule(path)
    if getattr(owner, "project_in", None) is not None:
        return None
    found = (name for name in _FINAL_NORMS if isinstance(getattr(owner, name, None), nn.Module))
    return next((f"{path}.{name}".lstrip(".") for name in found), None)


def eps_of(norm: Any) -> float:
    """Of a root mean square norm."""
    return norm.variance_epsilon


def rotary_channels(model: Any, pairs: str) -> Tensor:  # (P, 2)
    """The channels of a head that rotary positions turn together, paired as `Family.pairs` says."""
    if pairs == "none":
        return torch.empty(0, 2, dtype=torch.long)
    if pairs == "neighbours":
        counts = head_counts(model)
        return torch.arange(getattr(model.config, "rotary_dim", None) or (counts[2] if counts else 0)).view(-1, 2)
    frequencies = next(m.get_buffer("inv_freq") for m in model.modules() if "inv_freq" in m._buffers)
    return torch.arange(2 * len(frequencies)).view(2, -1).T
