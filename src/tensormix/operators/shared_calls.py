"""One product for several layers of a module, shared within each call of that module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from tensormix.operators.shared import Owner, View


def share_calls(parent: nn.Module, names: Iterable[str]) -> None:
    """Let the views `names` of one owner in `parent` share their product, as long as `forward` of `parent` is its own.

    The first of them that the forward of `parent` calls computes all; the others get their part if they are called
    with the very same tensor in the same call. Nothing is kept from one call to the next.
    """
    sharing, group = sharing_of(parent), tuple(names)
    if sharing is None:
        sharing = vars(parent)["forward"] = Sharing(parent)
    if isinstance(sharing, Sharing) and group not in sharing.groups:
        sharing.groups.append(group)


def sharing_of(parent: nn.Module) -> Any:
    """What stands in for the forward of its class; None if nothing does."""
    return vars(parent).get("forward")


def stop_sharing(parent: nn.Module, names: Iterable[str] | None = None) -> None:
    """Undo `share_calls`, of all views of `parent` if none are named."""
    sharing = sharing_of(parent)
    if isinstance(sharing, Sharing):
        sharing.groups = [] if names is None else [group for group in sharing.groups if group != tuple(names)]
        if not sharing.groups:
            del vars(parent)["forward"]


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody wants to see it called, or brings what it holds then (accelerate)."""
    return "_hf_hook" in vars(layer) or has_hooks(layer)


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody wants to see it called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


class Sharing:
    """The forward of a parent whose views share their products."""

    def __init__(self, parent: nn.Module) -> None:
        self.parent = parent
        self.groups: list[tuple[str, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.parent).forward(_Call(self.parent, self.groups), *args, **kwargs)  # pyright: ignore


class _Call:
    """`self` in one call of a parent's forward: the parent, except that its views share their products."""

    def __init__(self, parent: nn.Module, groups: Sequence[tuple[str, ...]]) -> None:
        self._parent = parent
        for names in groups:
            views: list[Any] = [getattr(parent, name) for name in names]
            owners = [getattr(view, "owner", None) for view in views]
            if owners[0] is not None and all(owner is owners[0] for owner in owners):  # else one was replaced meanwhile
                shared = _Shared(owners[0])
                for name, view in zip(names, views, strict=True):
                    setattr(self, name, _Part(view, shared))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parent, name)


class _Shared:
    """The outputs of all parts for one input, until each is fetched."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.x: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}

    def fetch(self, part: str, x: Tensor) -> Tensor:
        if self.x is not x or part not in self.outputs:
            self.x, self.outputs = x, dict(self.owner(x))
        return self.outputs.pop(part)


class _Part:
    """A view in one call of its parent."""

    def __init__(self, view: View, shared: _Shared) -> None:
        self._view, self._shared = view, shared

    def __call__(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        if is_watched(self._view):
            return self._view(x)
        y = self._shared.fetch(self._view.part, x)
        return y if self._view.bias is None else y + self._view.bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)
