"""Where a model can be compressed: the only module that knows how architectures name, fuse and call weights.

Shape letters: O out_features, I in_features. A weight is always read as (O, I), however the architecture stores it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.operators import Bypass
from tensormix.operators.base import StructuredLinear

# What a role is made of, for the architectures that multiply several projections at once.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
ROLES = ("q", "k", "v", "o", "gate", "up", "down", *FUSED)

# Matched against the end of a site's name, in this order.
_ROLE_NAMES = (
    (r"\bq_proj", "q"),
    (r"\bk_proj", "k"),
    (r"\bv_proj", "v"),
    (r"\b(qkv_proj|c_attn|query_key_value|Wqkv)", "qkv"),
    (r"\b(o_proj|out_proj|(attn|attention)\.c_proj|(self_)?attention\.dense)", "o"),
    (r"\bgate_up_proj", "gate_up"),
    (r"\bgate_proj", "gate"),
    (r"\b(up_proj|fc1|fc_in|c_fc|dense_h_to_4h)", "up"),
    (r"\b(down_proj|fc2|fc_out|mlp\.c_proj|dense_4h_to_h)", "down"),
)

# Blocks that return (hidden, attention weights) instead of the hidden state alone, as of transformers 5.
_TUPLE_BLOCKS = frozenset({"BloomBlock", "CodeGenBlock", "FalconDecoderLayer", "GPTJBlock", "GPTNeoBlock", "MptBlock"})


@dataclass(frozen=True, eq=False)
class Site:
    """One place whose weight a method may replace.

    `kind` is "linear" (a matrix inside a block) or "block" (a whole decoder block). `role` says what a matrix does
    (one of `ROLES`, or None for one we have no word for); `block` is the index of the decoder block.
    """

    name: str
    kind: str
    role: str | None
    block: int | None
    module: nn.Module

    @property
    def weight(self) -> Tensor:  # (O, I)
        weight = self.module.get_parameter("weight").detach()
        return weight.t() if is_conv1d(self.module) else weight

    @property
    def bias(self) -> Tensor | None:  # (O,)
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the transposed linear layer of GPT-2, recognised by name so that transformers is not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_dense(module: nn.Module) -> bool:
    # Subclasses of nn.Linear (packed 4-bit weights, adapters) do not hold a plain (O, I) matrix.
    return type(module) is nn.Linear or is_conv1d(module)


def role_of(name: str) -> str | None:
    """The role of the matrix called `name`; None if the name is not one we know."""
    return next((role for pattern, role in _ROLE_NAMES if re.search(pattern + "$", name)), None)


def locate_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks: the longest list of modules that is not inside another one.

    Raises ValueError if the model holds no list of modules.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [name for name, _ in lists]
    outer = [(n, m) for n, m in lists if len(m) and not any(n.startswith(f"{other}.") for other in names)]
    if not outer:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder blocks; tensormix needs a transformer that keeps its "
            "blocks in an nn.ModuleList, such as model.layers or transformer.h"
        )
    return max(outer, key=lambda item: len(item[1]))


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in the order in which they are called."""
    return locate_blocks(model)[1]


def find_sites(model: nn.Module) -> list[Site]:
    """Every site that is still dense: each block, followed by the linear layers inside it.

    Embeddings, the head and norms are never sites; what is compressed already is no longer one.
    """
    root, layers = locate_blocks(model)
    sites = []
    for index, block in enumerate(layers):
        if isinstance(block, Bypass):
            continue
        prefix = f"{root}.{index}"
        sites.append(Site(prefix, "block", None, index, block))
        for name, module in block.named_modules(prefix=prefix):
            if is_dense(module):
                sites.append(Site(name, "linear", role_of(name), index, module))
    return sites


def returns_tuple(block: nn.Module) -> bool:
    """Whether a decoder block returns (hidden, ...) instead of the hidden state alone."""
    return block.returns == "tuple" if isinstance(block, Bypass) else type(block).__name__ in _TUPLE_BLOCKS


def install(model: nn.Module, name: str, operator: nn.Module) -> None:
    """Put `operator` where the module `name` was.

    A bias moves over: it becomes the operator's, or is added to the one that the method fitted. A `Bypass` goes on
    telling the key-value cache how many tokens passed, because models ask the cache of one block for all of them.

    Raises:
        ValueError: nothing dense is at `name`, or the shapes differ.
    """
    old = model.get_submodule(name)
    if isinstance(operator, StructuredLinear):
        check_shape(old, name, operator)
        _move_bias(old, operator)
    elif isinstance(operator, Bypass):
        operator.register_forward_pre_hook(partial(_count_tokens, int(name.rpartition(".")[2])), with_kwargs=True)
    operator.train(old.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, operator)


def _count_tokens(index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the cache one number per token for block `index`, so that lengths, positions and masks stay right."""
    hidden = args[0] if args else kwargs["hidden_states"]
    cache: Any = kwargs.get("past_key_values", kwargs.get("layer_past", args[1] if len(args) > 1 else None))
    if hasattr(cache, "update"):
        cache.update(*hidden.new_zeros(2, len(hidden), 1, hidden.shape[1], 1), index)


def check_shape(old: nn.Module, name: str, operator: StructuredLinear) -> None:
    """Raise ValueError unless `operator` has the shape of the dense matrix that it replaces."""
    if not is_dense(old):
        raise ValueError(f"{name} is a {type(old).__name__}, not a dense linear layer: nothing can be installed there")
    site = Site(name, "linear", None, None, old)
    shape = (operator.out_features, operator.in_features)
    if shape != (site.out_features, site.in_features):
        raise ValueError(
            f"{name} holds a {site.out_features}x{site.in_features} matrix, "
            f"but the {type(operator).__name__} made for it is {shape[0]}x{shape[1]}"
        )


def _move_bias(old: nn.Module, operator: StructuredLinear) -> None:
    bias = getattr(old, "bias", None)
    if bias is None:
        return
    if operator.bias is None:
        operator.bias = bias
    else:
        with torch.no_grad():
            operator.bias.add_(bias.to(operator.bias))


def fill_dense(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:  # (O, I), (O,)
    """Give an empty dense layer its values, in the orientation in which the architecture stores them."""
    stored = weight.t() if is_conv1d(module) else weight
    module.register_parameter("weight", nn.Parameter(stored.detach().clone().contiguous()))
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
