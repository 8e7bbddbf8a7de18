"""Whether the residual stream of a model may be turned, seen on its twin.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.sites.locate import locate_blocks
from tensormix.sites.twin import Twin, twin_of

_TOLERANCE = 1e-3  # of the largest entry of the stream


def check_turns(
    model: nn.Module, norms: Mapping[int, Sequence[str]], writers: Mapping[int, Sequence[str]], last: str,
    *, keeps_mean: bool,
) -> None:  # fmt: skip
    """Raise ValueError, naming the block, if one reads the stream other than through its norms or adds to it otherwise.

    The stream is reflected from the first block on; the norms see it as it was, and what the writers put out is
    reflected. A model that does something else with it than these notices. One without a twin is not looked at.

    Args:
        norms, writers: names by the block that they are in.
        last: the norm after the blocks.
        keeps_mean: only what has no mean is reflected, as layer norms ask for.
    """
    twin = twin_of(model)
    if twin is None or len(twin.layers) != len(locate_blocks(model)[1]):
        return
    places = [(twin.layers[i], f"{twin.root}.{i}.", names) for part in (norms, writers) for i, names in part.items()]
    for block, prefix, names in places:
        if not {name.removeprefix(prefix) for name in names} <= {name for name, _ in block.named_modules()}:
            return
    try:
        before = _streams(twin, {}, {}, None, None)
    except Exception:  # whatever a model may not like about a few tokens, nothing was seen then
        return
    after = _streams(twin, norms, writers, last, keeps_mean)
    for index, stream in before.items():
        turned = stream if index == len(twin.layers) else _reflected(stream, bool(keeps_mean))
        if float((after[index] - turned).abs().max()) > _TOLERANCE * float(stream.abs().max()):
            place = "what follows the blocks" if index == len(twin.layers) else f"{twin.root}.{index}"
            raise ValueError(
                f"{place}: the residual stream of a {type(model).__name__} cannot be turned: seen with random weights, "
                "it is read or written there other than through the norms and layers that are known"
            )


def _reflected(x: Tensor, keeps_mean: bool) -> Tensor:  # (..., D) -> (..., D)
    """Its own inverse."""
    normal = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0), device="cpu")
    normal = normal - normal.mean() if keeps_mean else normal
    normal = normal / normal.norm()
    return x - 2 * (x @ normal)[..., None] * normal


def _streams(
    twin: Twin, norms: Mapping[int, Sequence[str]], writers: Mapping[int, Sequence[str]], last: str | None,
    keeps_mean: bool | None,
) -> dict[int, Tensor]:  # fmt: skip # (B, T, D) each
    """What leaves each block that runs, and the norm after them: reflected unless `keeps_mean` is None."""
    found: dict[int, Tensor] = {}

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_reflected(args[0], bool(keeps_mean)), *args[1:])

    def behind(_m: nn.Module, _a: Any, out: Tensor) -> Tensor:
        return _reflected(out, bool(keeps_mean))

    @contextmanager
    def watch(index: int, block: nn.Module) -> Iterator[None]:
        def note(_m: nn.Module, _a: Any, out: Any) -> None:
            found[index] = out[0] if isinstance(out, tuple | list) else out

        with ExitStack() as hooks:
            if keeps_mean is not None and index == 0:
                hooks.callback(block.register_forward_pre_hook(before).remove)
            for name in norms.get(index, ()):
                part = block.get_submodule(name.removeprefix(f"{twin.root}.{index}."))
                hooks.callback(part.register_forward_pre_hook(before).remove)
            for name in writers.get(index, ()):
                part = block.get_submodule(name.removeprefix(f"{twin.root}.{index}."))
                hooks.callback(part.register_forward_hook(behind).remove)
            hooks.callback(block.register_forward_hook(note).remove)
            yield

    with ExitStack() as hooks:
        if last is not None:
            hooks.callback(twin.model.get_submodule(last).register_forward_pre_hook(before).remove)
        found[len(twin.layers)] = twin.run(watch=watch)
    return found
