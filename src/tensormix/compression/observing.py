"""What the inputs of sites are measured by while the model runs, and how sites that read one tensor share that.

Shape letters: I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from tensormix.compression.units import Statistics
from tensormix.sites import Site, opened
from tensormix.statistics import Statistic


@contextmanager
def observe(model: nn.Module, sites: Mapping[str, Site], stats: Statistics) -> Iterator[None]:
    """While open, every statistic of `stats` is updated with the inputs (..., I) of its site, or of its expert."""
    layers = SharedInputs({name: stats[name][0] for name in stats})

    def watcher(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:  # (x,) of a linear layer, (x, expert) of a stack
            if len(args) == 1:
                layers.see(name, args[0])
                return
            for statistic in stats[name][args[1]].values():
                statistic.update(args[0])

        return hook

    with opened(model, [sites[name] for name in stats]) as modules:
        handles = [modules[name].register_forward_pre_hook(watcher(name)) for name in stats]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        layers.finish()


class _Memory(NamedTuple):
    """What two tensors have in common that are the same numbers, while one of them is held."""

    address: int
    version: int  # of what lies there: each change in place counts
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> _Memory:
        version = 0 if x.is_inference() else x._version
        return cls(x.data_ptr(), version, x.shape, x.stride(), x.dtype, x.device)


class SharedInputs:
    """Sites that read the same tensor, such as q, k and v, or gate and up, gather their statistics once.

    Which sites do is seen in the first batch. Of a later one the statistics of the first of them are updated when the
    last has come. A site that reads something else for once gets a copy of what they gathered until then, and goes on
    by itself. So each has what it would have had alone, to the bit.

    Args:
        statistics: by the name of the site.
    """

    def __init__(self, statistics: Mapping[str, Mapping[type, Statistic]]) -> None:
        self._of = statistics
        self._first: dict[str, str] = {}  # site -> the first of those that it shares with, perhaps itself
        self._met: dict[str, tuple[ref[Tensor], _Memory]] = {}  # what first sites have read, if that is all they saw
        self._waiting: dict[str, tuple[Tensor, _Memory, set[str]]] = {}  # of a first site, for those that have not come

    def see(self, name: str, x: Tensor) -> None:  # (..., I)
        """The site `name` reads `x`."""
        first = self._first.get(name)
        if first is None:
            self._meet(name, x)
        elif first == name:
            self._lead(name, x)
        else:
            self._follow(name, first, x)

    def finish(self) -> None:
        """No more batches come."""
        for name in list(self._waiting):
            self._settle(name)

    def _meet(self, name: str, x: Tensor) -> None:
        memory, kinds = _Memory.of(x), self._of[name].keys()
        if any(statistic.num_tokens for statistic in self._of[name].values()):
            self._first[name] = name
            self._update(name, x)
            return
        for first, (met, where) in self._met.items():
            if met() is not None and where == memory and self._of[first].keys() == kinds:
                self._first[name] = first
                self._share(first, {name})
                return
        self._first[name], self._met[name] = name, (ref(x), memory)
        self._update(name, x)

    def _lead(self, name: str, x: Tensor) -> None:
        self._met.pop(name, None)
        self._settle(name)
        others = {other for other, first in self._first.items() if first == name != other}
        if others:
            self._waiting[name] = x, _Memory.of(x), others
        else:
            self._update(name, x)

    def _follow(self, name: str, first: str, x: Tensor) -> None:
        _, memory, missing = self._waiting.get(first, (None, None, set()))
        if name in missing and memory == _Memory.of(x):
            missing.remove(name)
        else:
            self._leave(name)
            missing.discard(name)
            self._update(name, x)
        if first in self._waiting and not missing:
            self._settle(first)

    def _leave(self, name: str) -> None:
        for statistic in self._of[name].values():
            statistic.part()
        self._first[name] = name

    def _settle(self, name: str) -> None:
        """Update what is shared with the batch that waits. Who did not come for it saw nothing of it."""
        if name not in self._waiting:
            return
        x, memory, missing = self._waiting.pop(name)
        if _Memory.of(x) != memory:
            raise ValueError(f"{name}: the model changed the inputs of this site in place while others read them")
        for other in missing:
            self._leave(other)
        self._update(name, x)
        self._share(name, {other for other, first in self._first.items() if first == name != other})

    def _update(self, name: str, x: Tensor) -> None:
        for statistic in self._of[name].values():
            statistic.update(x)

    def _share(self, first: str, others: set[str]) -> None:
        for other in others:
            for kind, statistic in self._of[other].items():
                statistic.share(self._of[first][kind])
