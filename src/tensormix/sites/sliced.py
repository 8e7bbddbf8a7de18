"""A model with a narrower residual stream: which models can have one, and its empty modules put in place.

Shape letters: D hidden size, S width of the sliced residual stream.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormix.operators import SlicedBlock, SlicedNorm
from tensormix.sites.calls import Call
from tensormix.sites.families import FAMILIES, READS, WRITES, eps_of, family_of, final_norm_of, role_of
from tensormix.sites.installing import mark_replacement
from tensormix.sites.locate import locate_blocks
from tensormix.sites.turning import check_turns


def check_sliceable(model: nn.Module, *, look: bool = True) -> int:
    """The hidden size D of a model whose residual stream can be turned and sliced; with a `look` at its twin.

    Raises:
        ValueError: its blocks are of another kind, or a part of it is no longer dense.
    """
    root, layers = locate_blocks(model)
    for index, block in enumerate(layers):
        name, kind = f"{root}.{index}", type(block).__name__
        if not family_of(block).halves:
            known = ", ".join(name for name, family in FAMILIES.items() if family.halves)
            raise ValueError(
                f"{name} is a {kind}: slice_gpt turns the residual stream of dense blocks with root mean square norms "
                f"before attention and MLP and nothing else on the way ({known}); other models change "
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
    if not look and head is None and not _is_bare(model):
        raise ValueError(
            f"the residual stream is sliced, and a {type(model).__name__} has a head that reads all of it: load the "
            "causal language model, or the bare model with AutoModel"
        )
    has_ends = isinstance(embedding, nn.Embedding) and (type(head) is nn.Linear or (not look and head is None))
    if not (has_ends and final_norm_of(model, root)):
        raise ValueError(
            f"{type(model).__name__}: slice_gpt needs an embedding, a final norm and a head that are the usual ones"
        )
    if look:
        _look(model, root, layers)
    return embedding.embedding_dim


def _look(model: nn.Module, root: str, layers: nn.ModuleList) -> None:
    norms, writers = dict[int, list[str]](), dict[int, list[str]]()
    for index, block in enumerate(layers):
        norms[index] = [f"{root}.{index}.{norm}" for norm, _ in family_of(block).halves]
        writers[index] = [f"{root}.{index}.{name}" for name, (_, reads) in block_layers(block).items() if not reads]
    check_turns(model, norms, writers, final_norm_of(model, root) or "", keeps_mean=False)


def width_of(model: nn.Module) -> int | None:
    """S of a sliced model; None for any other."""
    widths = {block.attention_shortcut.in_features for block in model.modules() if isinstance(block, SlicedBlock)}
    return widths.pop() if widths else None


def shrink(model: nn.Module, width: int) -> None:
    """Put the modules of a residual stream of S channels where the dense ones are, with weights that mean nothing yet.

    Tied embeddings are tied no longer. Raises ValueError as `check_sliceable` does, or if S is not in 1..D.
    """
    full = check_sliceable(model, look=False)
    if not 1 <= width <= full:
        raise ValueError(f"the sliced residual stream must have 1 to {full} channels, got {width}")
    loaded: Any = model
    embedding, head = ends(model)
    root, layers = locate_blocks(model)
    last = final_norm_of(model, root) or ""
    for index, block in enumerate(layers):
        layers[index] = _sliced(block, width, full)
    weight = embedding.weight
    smaller = nn.Embedding(embedding.num_embeddings, width, embedding.padding_idx, device="meta", dtype=weight.dtype)
    loaded.set_input_embeddings(smaller.to_empty(device=weight.device))
    if head is not None:
        loaded.set_output_embeddings(_linear(width, head.out_features, head.bias is not None, head.weight))
    for module in ends(model):
        if module is not None:
            mark_replacement(module)
    model.set_submodule(last, SlicedNorm(full, eps_of(model.get_submodule(last))))
    loaded.config.tie_word_embeddings = False
    loaded.all_tied_weights_keys = {}
    loaded._no_split_modules = [*(loaded._no_split_modules or ()), SlicedBlock.__name__]


def _is_bare(model: nn.Module) -> bool:
    """Whether it puts out the hidden states themselves."""
    return getattr(model, "base_model", None) is model


def ends(model: nn.Module) -> tuple[nn.Embedding, Any]:
    """The embedding and the head, a linear layer; None if the model has no head."""
    loaded: Any = model
    return loaded.get_input_embeddings(), loaded.get_output_embeddings()


def final_norm(model: nn.Module) -> nn.Module:
    return model.get_submodule(final_norm_of(model, locate_blocks(model)[0]) or "")


def run_attention(block: Any, call: Call, hidden: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
    """The first half of a block: hidden + attention(norm(hidden))."""
    norm, attention = map(block.get_submodule, family_of(block).halves[0])
    return hidden + attention(hidden_states=norm(hidden), **call.kwargs)[0]


def run_mlp(block: Any, _: Call, hidden: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
    """The second half of a block: hidden + mlp(norm(hidden))."""
    norm, mlp = map(block.get_submodule, family_of(block).halves[1])
    return hidden + mlp(norm(hidden))


def block_layers(block: nn.Module) -> dict[str, tuple[nn.Linear, bool]]:
    """Name in the block -> a linear layer that touches the residual stream, and whether it reads it."""
    return {name: (cast(nn.Linear, module), role_of(name) in READS) for name, module in _linear_layers(block, "")}


def _linear_layers(block: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    found = block.named_modules(prefix=prefix)
    return [(name, module) for name, module in found if role_of(name) in READS | WRITES]


def _sliced(block: Any, width: int, full: int) -> SlicedBlock:
    """A sliced block around the attention and MLP of `block`, whose linear layers become smaller."""
    norms, parts = zip(*family_of(block).halves, strict=True)
    like = block.get_submodule(norms[0]).weight
    for name, (old, reads) in block_layers(block).items():
        sizes = (width, old.out_features) if reads else (old.in_features, width)
        block.set_submodule(name, _linear(*sizes, old.bias is not None, old.weight))
    first, second = (SlicedNorm(full, eps_of(block.get_submodule(norm))) for norm in norms)
    shortcuts = tuple(_linear(width, width, False, like) for _ in range(2))
    attention, mlp = (block.get_submodule(part) for part in parts)
    made = SlicedBlock(attention, mlp, (first, second), shortcuts)
    if hasattr(block, "attention_type"):
        made.attention_type = block.attention_type  # by which models choose the mask
    return made.train(block.training)


def _linear(in_features: int, out_features: int, bias: bool, like: Tensor) -> nn.Linear:
    empty = nn.Linear(in_features, out_features, bias, device="meta", dtype=like.dtype)
    return empty if like.is_meta else empty.to_empty(device=torch.device(like.device))
