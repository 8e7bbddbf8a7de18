"""A model with a narrower residual stream: which models can have one, and its empty modules put in place.

Shape letters: D hidden size, S width of the sliced residual stream.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormix.operators import SlicedBlock, SlicedNorm
from tensormix.sites.installing import mark_replacement
from tensormix.sites.sites import locate_blocks, role_of

# Blocks that do h + attention(norm(h)), then h + mlp(norm(h)), with root mean square norms, and nothing else.
_SLICEABLE = ("LlamaDecoderLayer", "MistralDecoderLayer", "Phi3DecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
READS = frozenset({"q", "k", "v", "qkv", "gate", "up", "gate_up"})
WRITES = frozenset({"o", "down"})


def check_sliceable(model: nn.Module) -> int:
    """The hidden size D of a model whose residual stream can be turned and sliced.

    Raises:
        ValueError: its blocks are of another kind, or a part of it is no longer dense.
    """
    root, layers = locate_blocks(model)
    for index, block in enumerate(layers):
        name, kind = f"{root}.{index}", type(block).__name__
        if kind not in _SLICEABLE:
            raise ValueError(
                f"{name} is a {kind}: slice_gpt turns the residual stream of dense blocks with root mean square norms "
                f"before attention and MLP and nothing else on the way ({', '.join(_SLICEABLE)}); other models change "
                "if it is turned"
            )
        for inner, module in _linear_layers(block, name):
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"{inner} is a {type(module).__name__} already; slice_gpt needs the dense model, so it comes first"
                )
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.children()):
            raise ValueError(f"{name} drops parts of its residual stream at random, which a sliced block does not")
    embedding, head = ends(model)
    if not (isinstance(embedding, nn.Embedding) and type(head) is nn.Linear and hasattr(_owner(model), "norm")):
        raise ValueError(
            f"{type(model).__name__}: slice_gpt needs an embedding, a final norm and a head that are the usual ones"
        )
    return embedding.embedding_dim


def width_of(model: nn.Module) -> int | None:
    """S of a sliced model; None for any other."""
    widths = {block.attention_shortcut.in_features for block in model.modules() if isinstance(block, SlicedBlock)}
    return widths.pop() if widths else None


def shrink(model: nn.Module, width: int) -> None:
    """Put the modules of a residual stream of S channels where the dense ones are, with weights that mean nothing yet.

    Tied embeddings are tied no longer. Raises ValueError as `check_sliceable` does, or if S is not in 1..D.
    """
    full = check_sliceable(model)
    if not 1 <= width <= full:
        raise ValueError(f"the sliced residual stream must have 1 to {full} channels, got {width}")
    loaded: Any = model
    embedding, head = ends(model)
    _, layers = locate_blocks(model)
    for index, block in enumerate(layers):
        layers[index] = _sliced(block, width, full)
    weight, owner = embedding.weight, _owner(model)
    smaller = nn.Embedding(embedding.num_embeddings, width, embedding.padding_idx, device="meta", dtype=weight.dtype)
    loaded.set_input_embeddings(smaller.to_empty(device=weight.device))
    loaded.set_output_embeddings(_linear(width, head.out_features, head.bias is not None, head.weight))
    for module in ends(model):
        mark_replacement(module)
    owner.norm = SlicedNorm(full, _eps(owner.norm))
    loaded.config.tie_word_embeddings = False
    loaded.all_tied_weights_keys = {}
    loaded._no_split_modules = [*(loaded._no_split_modules or ()), SlicedBlock.__name__]


def ends(model: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    """The embedding and the head."""
    loaded: Any = model
    return loaded.get_input_embeddings(), loaded.get_output_embeddings()


def final_norm(model: nn.Module) -> nn.Module:
    return cast(nn.Module, _owner(model).norm)


def block_layers(block: nn.Module) -> dict[str, tuple[nn.Linear, bool]]:
    """Name in the block -> a linear layer that touches the residual stream, and whether it reads it."""
    return {name: (cast(nn.Linear, module), role_of(name) in READS) for name, module in _linear_layers(block, "")}


def _linear_layers(block: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    found = block.named_modules(prefix=prefix)
    return [(name, module) for name, module in found if role_of(name) in READS | WRITES]


def _owner(model: nn.Module) -> Any:
    return model.get_submodule(locate_blocks(model)[0].rpartition(".")[0])


def _eps(norm: Any) -> float:
    return norm.variance_epsilon


def _sliced(block: Any, width: int, full: int) -> SlicedBlock:
    """A sliced block around the attention and MLP of `block`, whose linear layers become smaller."""
    like = block.input_layernorm.weight
    for name, (old, reads) in block_layers(block).items():
        sizes = (width, old.out_features) if reads else (old.in_features, width)
        block.set_submodule(name, _linear(*sizes, old.bias is not None, old.weight))
    first, second = (SlicedNorm(full, _eps(n)) for n in (block.input_layernorm, block.post_attention_layernorm))
    shortcuts = tuple(_linear(width, width, False, like) for _ in range(2))
    made = SlicedBlock(block.self_attn, block.mlp, (first, second), shortcuts)
    if hasattr(block, "attention_type"):
        made.attention_type = block.attention_type  # by which models choose the mask
    return made.train(block.training)


def _linear(in_features: int, out_features: int, bias: bool, like: Tensor) -> nn.Linear:
    empty = nn.Linear(in_features, out_features, bias, device="meta", dtype=like.dtype)
    return empty if like.is_meta else empty.to_empty(device=torch.device(like.device))
