"""Operators put into models, where something dense was.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormix.operators import DenseStack, Experts, Operator, Owner, StackedLinear, StandIn, View, outermost
from tensormix.operators.shared_calls import stop_sharing
from tensormix.sites.fused_experts import dense_stack, is_fused, open_experts, stack_names
from tensormix.sites.locate import locate_blocks
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


def install_owners(model: nn.Module, operators: Mapping[str, nn.Module]) -> dict[str, Owner]:
    """Put the owners of all views in `operators` (site name -> operator) where they belong, before these are installed.

    An owner goes into the smallest module around its sites that is called as a whole, so that neither a list nor
    experts hold it: under the name that its views have for it, or the next free one, which they get. One that is in
    the model already stays where it is.

    Returns:
        Its full name -> each owner that was put there.
    """
    users: dict[Owner, dict[str, list[View]]] = {}
    for site, operator in operators.items():
        for part in operator.modules():
            if isinstance(part, View):
                users.setdefault(part.connected, {}).setdefault(site, []).append(part)
    present, placed = set(model.modules()), {}
    for owner, sites in users.items():
        if owner in present:
            continue
        around = module_around(model, sites)
        holder, views = model.get_submodule(around), [view for found in sites.values() for view in found]
        name = free_name(holder, views[0].owner_name)
        holder.add_module(name, owner.train(holder.training))
        for view in views:
            view.owner_name = name
        placed[f"{around}.{name}".lstrip(".")] = owner
    return placed


def owners_closed_by(model: nn.Module, index: int) -> dict[str, Owner]:
    """Full name -> each owner outside of the blocks whose last user is in block `index`."""
    root, layers = locate_blocks(model)
    views = [(view, number) for number, block in enumerate(layers) for _, view in outermost(block, View)]
    last = {view.owner: number for view, number in views}
    owners = dict(outermost(model, Owner))
    return {n: owner for n, owner in owners.items() if last.get(owner) == index and not n.startswith(f"{root}.")}


def remove_owner(model: nn.Module, name: str) -> None:
    """Take out an owner that no view needs any more."""
    parent, _, child = name.rpartition(".")
    owner, holder = model.get_submodule(name), model.get_submodule(parent)
    users = [path for path, part in model.named_modules() if isinstance(part, View) and part.owner is owner]
    if users:
        raise ValueError(f"{name} cannot be taken out: {users[0]} multiplies through it")
    delattr(holder, child)
    if not any(isinstance(part, View) for part in holder.children()):
        stop_sharing(holder)


def module_around(model: nn.Module, sites: Iterable[str]) -> str:
    """The name of the smallest module around all `sites` that is called as a whole."""
    paths = [site.split(".")[:-1] for site in sites]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    while common:
        module = model.get_submodule(".".join(common))
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential | Experts) and not is_fused(module):
            break
        common.pop()
    return ".".join(common)


def free_name(holder: nn.Module, name: str) -> str:
    """`name`, or the first of name_2, name_3, ... if `holder` has something of that name."""
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    return next(free for free in names if not hasattr(holder, free))


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
    given = (*(kwargs.get(name) for name in ("past_key_values", "layer_past")), *args[1:])  # some give it by place
    cache: Any = next((one for one in given if hasattr(one, "update") and hasattr(one, "get_seq_length")), None)
    cache = getattr(cache, "self_attention_cache", cache)  # of a decoder that may attend to an encoder too
    layers = getattr(cache, "layers", ())
    own: Any = layers[index] if index < len(layers) else None
    # States of convolutions and linear attention: there are none, but tokens have passed.
    if hasattr(own, "has_previous_state"):
        own.has_previous_state = dict.fromkeys(own.has_previous_state, True)
    # Layers of a cache that hold no keys have no length either, and take none.
    if hasattr(cache, "update") and (own is None or hasattr(own, "get_seq_length")):
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
