"""Which tensors on disk make which parameter of a model, and making one parameter at a time.

transformers renames tensors when it loads them and merges those of experts into stacks. Its own tables of that are
used here, so that a parameter made alone equals, to the bit, the one that `from_pretrained` makes.
Shape letters: E experts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tensormix.storage.codes import codes_of, holds_codes, refusal_of
from tensormix.storage.entries import Entry, Piece
from tensormix.storage.foreign import Foreign
from tensormix.storage.formats import Format, passed_on
from tensormix.storage.packed import pack_of

Parts = dict[str, str]  # role -> tensor on disk: one "weight", or the parts of a packed one


@dataclass
class Making:
    """How parameters are made from tensors on disk: most often one from one, under another name at most."""

    targets: list[str]  # more than one where a tensor is cut apart
    converter: Any = None  # of transformers; None: one from one
    parts: dict[str, list[Parts]] = field(default_factory=dict)  # pattern of the converter -> what it takes, in order

    @property
    def sources(self) -> list[str]:
        """The tensors on disk."""
        return [name for several in self.parts.values() for parts in several for name in parts.values()]

    @property
    def stacks(self) -> bool:
        """Whether all that happens is that tensors of single experts are put into one (E, ..., ...) tensor."""
        found = self.converter.operations if self.converter else []
        operations = [(type(op).__name__, getattr(op, "dim", None)) for op in found]
        return operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


class Assembly:
    """The parameters and persistent buffers of `model` (dense, on meta) in terms of the tensors in `weights`.

    Attributes:
        makings: one for each group of parameters and tensors that belong together, in the order of the model.
        unknown: the tensors on disk that the model does not know.

    Raises:
        ValueError: the checkpoint lacks a tensor that the model needs, one has another shape than config.json
            implies, or holds codes and nothing says how they are scaled, or a file that describes itself holds one that
            the model does not know. Only headers have been read then.
    """

    def __init__(self, model: Any, weights: Format) -> None:
        self.weights, self.config = weights, model.config
        self.pack = pack_of(packed_config(model.config))
        self.targets: dict[str, Tensor] = dict(model.state_dict())  # on meta: the shapes and dtypes that are wanted
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys or {})
        self.unknown: list[str] = []
        self._made_by = self._match(model)
        self._turn_ties()
        self.makings = list({id(making): making for making in self._made_by.values()}.values())
        self._check_unknown(type(model).__name__)
        self._check_codes()
        self._check_missing(type(model).__name__)
        self._check_shapes()

    def _match(self, model: Any) -> dict[str, Making]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamed = partial(
            rename_source_key, weight_renamings=renamings, weight_converters=converters,
            base_model_prefix=model.base_model_prefix,
        )  # fmt: skip
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        made_by: dict[str, Making] = {}
        stored = self.weights.entries
        names = {self.pack.dense_name(name) for name in stored} if self.pack else stored.keys()
        for name in sorted(names, key=dot_natural_key):
            parts = self.pack.companions(name, stored) if self.pack else {"weight": name}
            target, pattern = self._renamed(name, meta_state_dict=self.targets)
            if target not in self.targets and name in self.targets:
                target, pattern = name, None
            if target not in self.targets:
                self.unknown += parts.values()
                continue
            if target not in made_by:
                converter = by_pattern[pattern] if pattern else None
                first, *rest = converter.target_patterns if converter else [target]
                making = Making([target, *(target.replace(first, other) for other in rest)], converter)
                made_by.update(dict.fromkeys(making.targets, making))
            made_by[target].parts.setdefault(pattern or name, []).append(parts)
        return made_by

    def _turn_ties(self) -> None:
        """A tied pair may be stored under either name, whatever the model says which is tied to which."""
        for target, source in list(self.tied.items()):
            if target in self._made_by and source not in self._made_by:
                del self.tied[target]
                self.tied[source] = target

    def _check_unknown(self, model: str) -> None:
        """What other formats hold beside the model is carried on; files that describe themselves hold the model."""
        if self.unknown and self.weights.described is not None:
            name = self.unknown[0]
            raise ValueError(
                f"{self.weights.entries[name].file} holds what would be {name}, which {model} has no place for: "
                "without it the model would be another; take its own folder of safetensors instead"
            )

    def _check_codes(self) -> None:
        """Codes are weights only together with their scales, which the pack of the checkpoint declares."""
        for making in self.makings:
            if not self.targets[making.targets[0]].is_floating_point():
                continue
            for parts in (parts for several in making.parts.values() for parts in several if len(parts) == 1):
                entry = self.weights.entries[next(iter(parts.values()))]
                if holds_codes(entry):
                    raise refusal_of(entry, self.weights.folder)

    def _check_missing(self, model: str) -> None:
        missing = [n for n in self.targets if n not in self._made_by and self.tied.get(n) not in self._made_by]
        for target in missing[:1]:
            if (entry := codes_of(target, self.unknown, self.weights.entries)) is not None:
                raise refusal_of(entry, self.weights.folder)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{self.weights.folder}: the weights lack {', '.join(missing[:3])}{more}, which {model} needs; "
                "the checkpoint is incomplete or of another model"
            )

    def _check_shapes(self) -> None:
        for making in self.makings:
            wanted = tuple(self.targets[making.targets[0]].shape)
            if making.stacks and any(len(several) != wanted[0] for several in making.parts.values()):
                counts = sorted({len(several) for several in making.parts.values()})
                raise ValueError(
                    f"{self.weights.folder}: {making.targets[0]} is stacked from {' and '.join(map(str, counts))} "
                    f"experts, but config.json implies {wanted[0]}"
                )
            if making.stacks:
                expected = (wanted[1] // len(making.parts), *wanted[2:])  # dimension 1 holds e.g. gate and up
            elif making.converter is None:
                expected = wanted
            else:
                continue  # the converter checks what it is given
            for parts in (parts for several in making.parts.values() for parts in several):
                entry = self.weights.entries[next(iter(parts.values()))]
                shape = entry.shape if "weight" in parts else self._packed_shape(parts)
                if shape not in (None, expected):
                    raise ValueError(
                        f"{entry.file}: {entry.name} has the shape {shape}, but config.json implies {expected}"
                        f"{self._about_vocabulary(shape, expected)}"
                    )

    def _packed_shape(self, parts: Parts) -> tuple[int, ...] | None:
        """Of a weight in the layout of another program; None for the layouts that stay as they are."""
        if not isinstance(self.pack, Foreign):
            return None
        shapes = {role: self.weights.entries[name].shape for role, name in parts.items()}
        return self.pack.shape(shapes, lambda role: self.weights.read(self.weights.entries[parts[role]]))

    def _about_vocabulary(self, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
        size = self.config.get_text_config().vocab_size if hasattr(self.config, "get_text_config") else None
        if shape[1:] != expected[1:] or expected[0] != size:
            return ""
        return f": the vocabulary was resized, and vocab_size is still {size}; it has to be {shape[0]}"

    def make(self, target: str) -> dict[str, Tensor]:
        """The parameter `target`, and those made along with it, in the dtypes that the model wants.

        Raises ValueError, naming the tensor, if it is packed and cannot be unpacked.
        """
        making = self._made_by[target]
        dtype = self.targets[making.targets[0]].dtype
        if making.converter is None:
            return {target: self._read(next(iter(making.parts.values()))[0], dtype)}
        if making.stacks:
            return {target: self._stack(making)}
        converter = copy.deepcopy(making.converter)
        for pattern, several in making.parts.items():
            converter.collected_tensors[pattern] = [self._read(parts, dtype) for parts in several]
        return converter.convert(making.targets[0], model=_Shapes(self.targets), config=self.config)

    def converted(self, making: Making) -> dict[str, Piece | Entry]:
        """The tensors on disk of `making`, unpacked and in the dtype that the model wants, each made when written."""
        wanted = self.targets[making.targets[0]]
        pieces: dict[str, Piece | Entry] = {}
        for parts in (parts for several in making.parts.values() for parts in several):
            first = self.weights.entries[next(iter(parts.values()))]
            if self.pack is None or len(parts) == 1:
                pieces[first.name] = passed_on(self.weights, first, wanted.dtype if first.is_float else None)
            else:
                shape = first.shape if "weight" in parts else self._packed_shape(parts) or tuple(wanted.shape)
                make = partial(self._read, parts, wanted.dtype)
                pieces[self.pack.dense_name(first.name)] = Piece.made(make, shape, wanted.dtype)
        return pieces

    def _read(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        tensors = {role: self.weights.read(self.weights.entries[name]) for role, name in parts.items()}
        if self.pack is not None:
            try:
                return self.pack.unpack(tensors, dtype)
            except ValueError as error:
                entry = self.weights.entries[next(iter(parts.values()))]
                raise ValueError(f"{entry.file}: {entry.name}: {error}") from None
        tensor = tensors["weight"]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _stack(self, making: Making) -> Tensor:  # (E, ..., ...)
        """Expert by expert into one tensor: what is read is mapped, so that the stack is in memory only once."""
        wanted = self.targets[making.targets[0]]
        stack = torch.empty(wanted.shape, dtype=wanted.dtype)
        chunks = stack.chunk(len(making.parts), dim=1)
        ordered = [pattern for pattern in making.converter.source_patterns if pattern in making.parts]
        for chunk, pattern in zip(chunks, ordered, strict=True):
            for expert, parts in zip(chunk, making.parts[pattern], strict=True):
                expert.copy_(self._read(parts, wanted.dtype))
        return stack

    def stored_name(self, name: str) -> str:
        """How the files call a tensor of an operator in the model: as the dense ones around it, if they lie elsewhere.

        Other classes, such as that of the text alone, find it there by the rules that they have for dense ones.
        """
        *path, leaf = name.split(".")
        for end in range(len(path), 0, -1):
            place = self._places.get(".".join(path[:end]))
            if place is not None:
                stored = ".".join([*place, *path[end:], leaf])
                found = stored != name and self._renamed(stored, meta_state_dict={name: True}) == (name, None)
                return stored if found else name
        return name

    @cached_property
    def _places(self) -> dict[str, list[str]]:
        """Module of the model -> where the files have what it holds."""
        places: dict[str, list[str]] = {}
        for target, making in self._made_by.items():
            if making.converter is not None:
                continue
            ours, theirs = target.split("."), making.sources[0].split(".")
            while ours and theirs and ours[-1] == theirs[-1]:
                ours.pop()
                theirs.pop()
                places.setdefault(".".join(ours), list(theirs))
        return places

    def bits_of(self, target: str) -> int:
        """What the parameter takes on disk, scales and all; of parameters made together, its share by size."""
        making = self._made_by[target]
        total = sum(self.weights.bits(self.weights.entries[name]) for name in making.sources)
        numbers = [self.targets[name].numel() for name in making.targets]
        return total * self.targets[target].numel() // sum(numbers)


@dataclass
class _Shapes:
    """What some conversions ask of a model."""

    targets: dict[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        return self.targets[name]


def packed_config(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` that says how weights are packed; of a compressed checkpoint, its source's."""
    found = getattr(config, "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else found.to_dict()
    return found.get("packed") if found is not None and found.get("quant_method") == "tensormix" else found
