"""Operators put into models, where something dense was.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormix.operators import DenseStack, Operator, StackedLinear, StandIn
from tensormix.sites.fused_experts import dense_stack, is_fused, open_experts, stack_names
from tensormix.sites.sites import Site, is_conv1d, is_dense


def install(model: nn.Module, name: str, operator: nn.Module, *, move_bias: bool = True) -> None:
    """Put `operator` where the module `name` was.

    A bias moves over, unless `move_bias` is false: it becomes the operator's, or is added to the one that the method
    fitted. A stand-in goes on telling the key-value cache how many tokens passed, because models ask the cache of one
    block for all of them.

    Fused experts are opened first when `name` is one of their stacks.

    Raises:
        ValueError: nothing dense is at `name`, or the shapes or numbers of experts differ.
    """
    parent, _, child = name.rpartition(".")
    old = dense_at(model, name)
    if isinstance(operator, StandIn):
        operator.register_forward_pre_hook(partial(_count_tokens, int(child)), with_kwargs=True)
    elif isinstance(operator, Operator):
        check_shape(old, name, operator)
        if is_fused(model.get_submodule(parent)):
            open_experts(model, parent)
        if move_bias:
            _move_bias(old, operator)
    else:
        mark_replacement(operator)
    operator.train(old.training)
    setattr(model.get_submodule(parent), child, operator)


def mark_replacement(module: nn.Module) -> None:
    """Note that a module of the model's own kind took the place of another: what asks operators then finds it too."""
    vars(module)["is_replacement"] = True


def is_replacement(module: nn.Module) -> bool:
    """Whether it took the place of other weights, as an operator or as a module of the model's own kind."""
    return getattr(module, "is_replacement", False) is True


def dense_at(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`; if it is a stack of fused experts, the one that opening them would put there.

    Raises AttributeError if the model has none.
    """
    parent, _, child = name.rpartition(".")
    experts = model.get_submodule(parent)
    if is_fused(experts) and child in stack_names(experts):
        return dense_stack(experts, child).train(experts.training)
    return model.get_submodule(name)


def _count_tokens(index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the cache one number per token for block `index`, so that lengths, positions and masks stay right."""
    hidden = args[0] if args else kwargs["hidden_states"]
    cache: Any = kwargs.get("past_key_values", kwargs.get("layer_past", args[1] if len(args) > 1 else None))
    if hasattr(cache, "update"):
        cache.update(*hidden.new_zeros(2, len(hidden), 1, hidden.shape[1], 1), index)


def check_shape(old: nn.Module, name: str, operator: Operator) -> None:
    """Raise ValueError unless `operator` has the shape of the dense matrix, or stack of them, that it replaces."""
    made, stacked = type(operator).__name__, isinstance(operator, StackedLinear)
    if isinstance(old, DenseStack) and not stacked:
        raise ValueError(
            f"{name} holds the matrices of {old.num_experts} experts, but a {made} replaces only one; "
            f"put {old.num_experts} of them into an ExpertStack"
        )
    if not (isinstance(old, DenseStack) if stacked else is_dense(old)):
        wanted = "dense stack of experts" if stacked else "dense linear layer"
        raise ValueError(f"{name} is a {type(old).__name__}, not a {wanted}: nothing can be installed there")
    site = Site(name, "experts" if stacked else "linear", None, None, old)
    (holds, for_each), (brings, of_each) = (
        (f"{part.out_features}x{part.in_features}", f" for each of {part.num_experts} experts" if stacked else "")
        for part in (site, cast(Any, operator))
    )
    if (holds, for_each) != (brings, of_each):
        raise ValueError(f"{name} holds a {holds} matrix{for_each}, but the {made} made for it is {brings}{of_each}")


def _move_bias(old: nn.Module, operator: Any) -> None:
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
