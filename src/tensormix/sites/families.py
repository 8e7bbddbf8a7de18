"""All that is known of architectures: names that they share, and one record for each class of decoder blocks.

A block of a class without a record is compressed matrix by matrix all the same; what a record adds is in `Family`.
A new family is one record here and one line in the tests' zoo; docs/families.md says what each of them supports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

# What a role is made of, for the architectures that multiply several projections at once.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
# "in" and "out" are the layers into and out of what mixes tokens without attention: convolutions, state spaces.
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "in", "out", *FUSED)
READS = frozenset({"q", "k", "v", "qkv", "gate", "up", "gate_up", "in"})  # the residual stream, through a norm
WRITES = frozenset({"o", "down", "out"})  # and add to it

# Matched against the end of a matrix's name, in this order.
_ATTENTION = r"(attn|attention|self_att\w*|multi_head_attention|encoder_attn|crossattention)"
_ROLE_NAMES = (
    (r"\b(q_proj(\.linear)?|query_proj|project_q|q_lin|(cross)?attention\.self\.query|Wq)", "q"),
    (r"\b(k_proj(\.linear)?|key_proj|project_k|k_lin|(cross)?attention\.self\.key|Wk)", "k"),
    (r"\b(v_proj(\.linear)?|value_proj|project_v|v_lin|(cross)?attention\.self\.value|Wv)", "v"),
    (r"\b(qkv_proj|c_attn|query_key_value|Wqkv)", "qkv"),
    # What leaves a convolution, a state space or linear attention is called out_proj too.
    (rf"\b(o_proj(\.linear)?|out_lin|attention_out|{_ATTENTION}\.(out_proj|c_proj|dense|output\.dense|Wo))", "o"),
    (r"\b(gate_up_proj|mlp\.Wi|shared_mlp\.input_linear)", "gate_up"),
    (r"\b(gate_proj|feed_forward\.w1|w_in\.w_0)", "gate"),
    (r"\b(up_proj|fc1|fc_in|c_fc|dense_h_to_4h|feed_forward\.(w3|intermediate)|w_in\.w_1)", "up"),
    (r"\b(ff\.layer_1|ffn\.0|intermediate\.dense|ffn\.proj_up|feed_forward\.key)", "up"),
    (r"\bffn\.proj_up_gate", "gate"),
    (r"\b(down_proj|fc2|fc_out|mlp\.(c_proj|Wo)|dense_4h_to_h|feed_forward\.(w2|output)|w_out)", "down"),
    (r"\b(ff\.layer_2|ffn\.2|output\.dense|shared_mlp\.output_linear|ffn\.proj_down|feed_forward\.value)", "down"),
    (r"\b(in_proj(_\w+)?|linear_[xy]|linear_attn\.[abg]_proj)", "in"),
    (r"\bblocks\.\d+\.attention\.(receptance|key|value)", "in"),
    (r"\bmlstm_layer\.(q|k|v|[fio]gate_preact)", "in"),
    (r"\b(out_proj|linear_out|blocks\.\d+\.attention\.output)", "out"),
)
_INSIDE_ATTENTION = re.compile(r"(attn|attention)\.(\w+\.)*(gate|up|down)_proj$")  # gates of its own, not of an MLP
# How the rows of a fused qkv lie: head by head in turns, or all of q, then of k, then of v.
_QKV_TAKES_TURNS = {"query_key_value": True, "qkv_proj": False, "c_attn": False, "Wqkv": False}
# What decides where a token goes is small, and a small error there sends the token elsewhere. It stands beside experts.
_ROUTER = re.compile(r"router|(^|_)gate$|^gate(_|$)(?!up|proj)|^wg$")
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
        mixes_qkv: whether the rows of its fused qkv lie in an order of their own.
    """

    halves: tuple[tuple[str, str], ...] = ()
    norms: Mapping[str, tuple[str, ...]] | None = None
    pairs: Literal["halves", "neighbours", "none"] | None = None
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
    "GPTJBlock": Family(norms={"ln_1": ("attn.", "mlp.")}, pairs="neighbours"),
    "GPTNeoXLayer": Family(
        norms={"input_layernorm": ("attention.",), "post_attention_layernorm": ("mlp.",)}, pairs="halves"
    ),
    "CodeGenBlock": Family(mixes_qkv=True),
}


def family_of(block: nn.Module) -> Family:
    """The record of a block; one without special knowledge if its class has none."""
    return FAMILIES.get(type(block).__name__, Family())


def role_of(name: str) -> str | None:
    """The role of the matrix called `name`; None if the name is not one we know."""
    if _INSIDE_ATTENTION.search(name):
        return None
    return next((role for pattern, role in _ROLE_NAMES if re.search(pattern + "$", name)), None)


def routers_in(block: nn.Module) -> tuple[str, ...]:
    """How the names begin of what decides where tokens go: children called router or gate of a module with experts."""
    found = []
    for name, part in block.named_modules():
        children = dict(part.named_children())
        if any("experts" in child for child in children):
            found += [f"{name}.{child}".lstrip(".") for child in children if _ROUTER.search(child)]
        if "router" in name.rpartition(".")[2]:
            found.append(name)
    return tuple(f"{name}." for name in found)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the transposed linear layer of GPT-2, recognised by name so that transformers is not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_dense(module: nn.Module) -> bool:
    """Whether it multiplies by its (O, I) matrix and adds its bias, and does nothing else."""
    return type(module) is nn.Linear or is_conv1d(module) or (isinstance(module, nn.Linear) and _is_plain(type(module)))


@cache
def _is_plain(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of nn.Linear does what nn.Linear does, seen on an object that has nothing but a matrix.

    Routers, packed and scaled weights and adapters do not: they return something else, or need more than a matrix.
    """
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = 5, 3
    layer.weight = nn.Parameter(torch.linspace(-1, 2, 15).view(3, 5), requires_grad=False)
    x = torch.linspace(-2, 1, 20).view(1, 4, 5)
    for bias in (None, nn.Parameter(torch.linspace(0, 1, 3), requires_grad=False)):
        layer.register_parameter("bias", bias)
        try:
            out = layer(x)
        except Exception:
            return False
        if not isinstance(out, Tensor) or not torch.allclose(out, nn.functional.linear(x, layer.weight, bias)):
            return False
    return True


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
