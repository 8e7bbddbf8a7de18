"""Where the decoder blocks of a model are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tensormix.operators import outermost


def locate_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks: the list of modules that is not inside another one, and
    that is as long as the config says, else the longest.

    Of a model of images or sound and text it is that of the part which makes text.

    Raises ValueError if the model holds no list of modules.
    """
    inner = tuple(f"{name}." for name, _ in outermost(model))
    decoder = _decoder_of(model)
    lists = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and not n.startswith(inner) and n.startswith(decoder)
    ]
    names = [name for name, _ in lists]
    outer = [(n, m) for n, m in lists if len(m) and not any(n.startswith(f"{other}.") for other in names)]
    if not outer:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder blocks; tensormix needs a transformer that keeps its "
            "blocks in an nn.ModuleList, such as model.layers or transformer.h"
        )
    of_text = [(name, layers) for name, layers in outer if _is_of_text(model, name)]
    wanted = _num_blocks(model)

    def likelihood(item: tuple[str, nn.ModuleList]) -> tuple[bool, bool, int]:
        has_parts = any(True for _ in item[1][0].children())  # embeddings and heads of several codebooks have none
        return has_parts, len(item[1]) == wanted, len(item[1])

    return max(of_text or outer, key=likelihood)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in the order in which they are called."""
    return locate_blocks(model)[1]


def _is_of_text(model: nn.Module, name: str) -> bool:
    """Whether the part that holds this list has the config for text, and not one of its own for images or sound."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return True
    while name:
        name = name.rpartition(".")[0]
        own = vars(model.get_submodule(name)).get("config")
        if own is not None:
            return type(own) is type(config.get_text_config())
    return True


def _num_blocks(model: nn.Module) -> int | None:
    """How many blocks the config for text says that there are."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    try:
        return getattr(text, "num_hidden_layers", None)
    except AttributeError:  # what it is called in the config is not there
        return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that compiling or data parallelism wraps; it holds the same modules under its own names."""
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = model._modules.get("module" if parallel else "_orig_mod")
    return model if inner is None else unwrapped(inner)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[bool]:
    """While open, no part of `model` is wrapped, so that all names are the model's own.

    What stands in the place of a part afterwards stays as it is. Yields whether there are such parts.
    """
    wrapped = [
        (parent, name, child, unwrapped(child))
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and unwrapped(child) is not child
    ]
    for parent, name, _, inner in wrapped:
        parent._modules[name] = inner
    try:
        yield bool(wrapped)
    finally:
        for parent, name, child, inner in wrapped:
            if parent._modules.get(name) is inner:
                parent._modules[name] = child


def _decoder_of(model: nn.Module) -> str:
    """How the names of what makes text begin; an empty string if the model does not say."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    names = [name for name, part in model.named_modules() if part is decoder]
    holds = decoder is not None and any(isinstance(part, nn.ModuleList) for part in decoder.modules())
    return names[0] if names and holds else ""
