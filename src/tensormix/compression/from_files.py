"""Blocks that come from the files of a checkpoint, one at a time, and leave memory again; nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tensormix.compression import Home
from tensormix.operators import DenseStack, Owner, outermost
from tensormix.rows import Row
from tensormix.sites import Site, locate_blocks
from tensormix.sites.families import EXPERT_WEIGHTS
from tensormix.storage.assembly import Assembly, Making
from tensormix.storage.memory import empty_weights, give_back, set_weight
from tensormix.storage.safetensors import shard_name


@dataclass
class Shard:
    """What goes into one file: a block, or everything that is in none."""

    file: str
    makings: list[Making] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # tensors on disk that only pass through


class Source(Home):
    """The home of the blocks of `model` (a skeleton on meta) when their weights are in the files of `assembly`.

    `device` is where the weights of an entered block are.
    """

    def __init__(self, model: Any, assembly: Assembly, device: str = "cpu") -> None:
        self.model, self.assembly, self.device = model, assembly, device
        self.entries = assembly.weights.entries
        self.root, self.layers = locate_blocks(model)
        self.shards = self._shards(len(self.layers))  # one for each block, and the last one for the rest
        self._entered: dict[int, list[nn.Module]] = {}

    def _shards(self, num_blocks: int) -> list[Shard]:
        total = num_blocks + 1
        shards = [Shard(shard_name(number, total)) for number in range(total)]
        for making in self.assembly.makings:
            shards[self._block_of(making.targets[0], num_blocks)].makings.append(making)
        for name in self.assembly.unknown:
            shards[self._block_of(name, num_blocks)].unknown.append(name)
        return shards

    def _block_of(self, name: str, num_blocks: int) -> int:
        head, _, tail = name.partition(f"{self.root}.")
        number = tail.split(".")[0]
        return int(number) if not head and number.isdecimal() and int(number) < num_blocks else num_blocks

    @contextmanager
    def rest(self) -> Iterator[None]:
        modules = self._outside()
        self._fill(len(self.layers), {})
        for target, source in self.assembly.tied.items():
            if target not in self.entries:
                set_weight(self.model, target, self.model.get_parameter(source))
        yield
        empty_weights(modules)

    def enter(self, index: int) -> None:
        self._entered[index] = list(self.layers[index].modules())  # among them those that will be replaced
        self._fill(index, {})
        for target, source in self.assembly.tied.items():
            if self._block_of(target, len(self.layers)) == index != self._block_of(source, len(self.layers)):
                set_weight(self.model, target, self.assembly.make(source)[source].to(self.device))

    def dense_bits(self, site: Site) -> int:
        index = site.block
        if site.kind == "block" and index is not None:
            names = [name for making in self.shards[index].makings for name in making.sources]
            return sum(self.assembly.weights.bits(self.entries[name]) for name in names)
        if site.kind == "experts":
            path, _, stack = site.name.rpartition(".")
            fused = f"{path}.{EXPERT_WEIGHTS[stack]}"
            return self.assembly.bits_of(f"{site.name}.stack" if isinstance(site.module, DenseStack) else fused)
        return self.assembly.bits_of(f"{site.name}.weight")

    def tidy(self) -> None:
        give_back()

    def leave(self, index: int, rows: list[Row]) -> None:
        self.release(index)

    def release(self, index: int) -> None:
        empty_weights([*self._entered.pop(index, []), *self.layers[index].modules()])
        give_back()

    def _fill(self, number: int, operators: Mapping[str, Any]) -> None:
        """Give the modules of a shard their dense weights, where `operators` have not taken their place."""
        for making, kept in self._kept(number, operators):
            if kept:
                made = self.assembly.make(making.targets[0])
                for target in kept:
                    set_weight(self.model, target, made[target].to(self.device))

    def _state(self, number: int) -> dict[str, Tensor]:
        """The tensors of a block as it is now; of the shard after the blocks, those of the whole model."""
        if number == len(self.layers):
            return self.model.state_dict()
        return self.layers[number].state_dict(prefix=f"{self.root}.{number}.")

    def _kept(self, number: int, operators: Mapping[str, Any]) -> Iterator[tuple[Making, list[str]]]:
        """The makings of a shard, each with those of its parameters that the model still has."""
        there = {name: tensor.shape for name, tensor in self._state(number).items()}
        wanted = self.assembly.targets
        for making in self.shards[number].makings:
            yield making, [t for t in making.targets if there.get(t) == wanted[t].shape and not inside(t, operators)]

    def _outside(self) -> list[nn.Module]:
        """All that is in no block; without owners, which blocks multiply through."""
        inside = {id(module) for module in self.layers.modules()}
        inside |= {id(part) for _, owner in outermost(self.model, Owner) for part in owner.modules()}
        return [module for module in self.model.modules() if id(module) not in inside]


def inside(name: str, operators: Iterable[str]) -> bool:
    """Whether a tensor belongs to one of the modules in `operators`."""
    return any(name.startswith(f"{operator}.") for operator in operators)
