"""A stand-in for a model that shows how its blocks work: the same classes and sizes, random weights, none of the files.

What a block returns, which of its weights are multiplied by the layer that holds them, and what may be turned without
anybody noticing is seen when it runs. It does not depend on the weights, so that it is known before any is read.

Shape letters: B sequences, T tokens, D hidden size, O out_features, I in_features.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tensormix.sites.locate import locate_blocks
from tensormix.sites.quiet import quiet

Edit = Callable[[int, nn.Module], None]  # changes the weights of a block, which is called with its index

# A larger weight is made of shifted views of one row: such a matrix takes no memory, and is as good as random.
_LARGEST = 1 << 16
_SEQUENCES, _TOKENS = 4, 8


class Twin:
    """A model of the same class and config as `model`, whose weights exist only while a block runs.

    Blocks of one kind (the same classes, sizes and settings) do the same, so only the first of each kind is run, and
    the others hand on what enters them. A pass costs as much as a few tokens through as many blocks as there are kinds.

    Attributes:
        kinds: for each block the index of the first one of its kind.
        read: for each of these what the model read of the block, by name.
        at: the block that ran last, where a pass failed perhaps.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = deepcopy(model.config)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"), quiet():
            make: Any = type(model)._from_config  # type: ignore[attr-defined]
            # Expert by expert: a grouped product takes no weights without memory of their own.
            self.model: Any = make(config, dtype=torch.float32, experts_implementation="eager").eval()
        self.root, self.layers = locate_blocks(self.model)
        with torch.device("cpu"):  # whatever the device is on which a model is just being made
            fill_buffers(self.model)
            _fill(self.model, "", skip=self.root)
        kinds: dict[object, int] = {}
        self.read: dict[int, dict[str, Any]] = {}
        self.at = 0
        self.kinds = [kinds.setdefault(_kind(block), index) for index, block in enumerate(self.layers)]

    @cached_property
    def tokens(self) -> Tensor:  # (B, T)
        """Ids that stand for text: none of those that the config gives another meaning."""
        config: Any = self.model.config
        special = {v for part in (config, config.get_text_config()) for k, v in _scalars(part) if k.endswith("_id")}
        size = getattr(self.model.get_input_embeddings(), "num_embeddings", None) or config.get_text_config().vocab_size
        plain = [token for token in range(min(size, 512)) if token not in special] or [0]
        chosen = torch.randint(len(plain), (_SEQUENCES, _TOKENS), generator=_generator("tokens"))
        return torch.tensor(plain, device="cpu")[chosen]

    @torch.no_grad()
    def run(
        self, edit: Edit | None = None, watch: Callable[[int, nn.Module], Any] | None = None,
        leave: Callable[[int, Any], Any] | None = None, every: tuple[int, ...] = (),
        put: Mapping[int, nn.Module] | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip # (B, T, D)
        """What leaves the last block, and the norm after it, for `tokens`; the same at every call without `edit`.

        Args:
            edit: is called with each block before it runs, filled; what it changes holds for this pass.
            watch: likewise; returns a context manager that is open while the block runs.
            leave: is called with what a block returns, and returns what leaves it.
            every: blocks that run although one of their kind ran before.
            put: modules that stand in the place of blocks.
            options: for the model, such as a cache.
        """
        real, before = list(self.layers), dict[int, Any]()
        try:
            for index, block in enumerate(real):
                runs = self.kinds[index] == index or index in every
                stage = _Stage(self, index, block, runs, edit, watch, leave, before)
                self.layers[index] = (put or {}).get(index, stage)
            with torch.device("cpu"), quiet():
                return call_model(text_part(self.model), self.tokens, **options)[0]
        finally:
            for index, block in enumerate(real):
                self.layers[index] = block

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While open, `read` gathers what the model reads of its blocks."""
        real = list(self.layers)
        for index, block in enumerate(real):
            self.layers[index] = _Stage(self, index, block, False, None, None, None, {})
        try:
            yield
        finally:
            for index, block in enumerate(real):
                self.layers[index] = block


class _Stage(nn.Module):
    """One block of a twin: filled, run and emptied again; or passed by, if one of its kind ran."""

    def __init__(self, twin: Twin, index: int, block: nn.Module, runs: bool, *callbacks: Any) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: the model must not see it
        self.twin, self.index, self.runs = twin, index, runs
        self.edit, self.watch, self.leave, self.before = callbacks

    def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks, e.g. attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["block"], name)
            self.twin.read.setdefault(self.twin.kinds[self.index], {})[name] = value
            return value

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        block, kind = self.__dict__["block"], self.twin.kinds[self.index]
        self.twin.at = self.index
        if not self.runs and kind in self.before:
            left = self.before[kind]
            return (hidden, *left[1:]) if isinstance(left, tuple | list) else hidden
        _fill(block, f"block {kind}")
        try:
            if self.edit is not None:
                self.edit(self.index, block)
            if self.watch is None:
                left = block(hidden, *args, **kwargs)
            else:
                with self.watch(self.index, block):
                    left = block(hidden, *args, **kwargs)
        finally:
            _empty(block)
        if self.leave is not None:
            left = self.leave(self.index, left)
        self.before[kind] = left
        return left


def text_part(model: nn.Module) -> nn.Module:
    """What is called with token ids, without the head: all of the model, or its decoder if it takes images first."""
    whole: Any = getattr(model, "base_model", model)
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    reads_text = next(iter(inspect.signature(whole.forward).parameters)) in ("input_ids", "input", "args")
    if reads_text or not isinstance(decoder, nn.Module) or getattr(model.config, "is_encoder_decoder", False):
        return whole
    part: Any = getattr(decoder, "base_model", decoder)
    return part


def call_model(model: nn.Module, tokens: Tensor, **options: Any) -> Any:  # (B, T)
    """The outputs of a model without a cache, where it knows of one."""
    known = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    cache = {"use_cache": False} if anything or "use_cache" in known else {}
    return model(tokens, **{**cache, **options})


_twins: dict[tuple[type, str], Twin] = {}  # the last ones made: they hold no weights of blocks
_MOST_TWINS = 8
# Of each model the settings that its twin was found for: to write a whole config out takes a millisecond.
_found: WeakKeyDictionary[nn.Module, tuple[object, Twin]] = WeakKeyDictionary()


def twin_of(model: nn.Module) -> Twin | None:
    """The twin of a model of transformers, made once for all models of one class and config; None of any other."""
    config: Any = getattr(model, "config", None)
    if not hasattr(type(model), "_from_config") or config is None:
        return None
    settings = id(config), tuple(_scalars(config))
    known = _found.get(model)
    if known is not None and known[0] == settings:
        return known[1]
    key = type(model), config.to_json_string(use_diff=False)
    if key not in _twins:
        made = Twin(model)
        while len(_twins) >= _MOST_TWINS:
            del _twins[next(iter(_twins))]
        _twins[key] = made
    _found[model] = settings, _twins[key]
    return _twins[key]


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(name), dtype=torch.float32, device="cpu")


def random_like(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Random numbers of a size that keeps what passes them as large as it is; the same for the same name."""
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    if len(shape) < 2:
        around = 1.0 if name.endswith("weight") else 0.0  # gains of norms; logarithms and the like are small
        return (around + 0.3 * _normal(name, *shape)).to(dtype)
    scale = shape[-1] ** -0.5
    if shape.numel() <= _LARGEST:
        return (scale * _normal(name, *shape)).to(dtype)
    needed = sum(shape) - len(shape) + 1
    row = (scale * _normal(name, needed)).to(dtype)
    if len(shape) != 3:
        return row.as_strided(shape, [1] * len(shape))
    # Each matrix of a stack is multiplied alone, and would be copied for it: this way only the first is there.
    experts, rows, columns = shape
    longer = rows + -(-experts // columns)
    row = torch.cat([row, row[: max(0, longer + columns - 1 - needed)]])
    return row.as_strided((longer, columns), (1, 1)).flatten().as_strided(shape, (1, columns, 1))


def _fill(module: nn.Module, name: str, skip: str | None = None) -> None:
    """Give every weight of `module` its random numbers, except those below `skip`."""
    for path, part in module.named_modules():
        if skip is not None and f"{path}.".startswith(f"{skip}."):
            continue
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                value = random_like(f"{name}.{path}.{leaf}", parameter.shape, parameter.dtype)
                part._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for leaf, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[leaf] = random_like(f"{name}.{path}.{leaf}", buffer.shape, buffer.dtype)


def _empty(module: nn.Module) -> None:
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What makes two blocks do the same: the classes, sizes and settings of all that is in them."""
    found: list[object] = []
    for name, part in block.named_modules():
        sizes = [(leaf, tuple(p.shape)) for leaf, p in part._parameters.items() if p is not None]
        settings = [(k, v) for k, v in _scalars(part) if k not in ("layer_idx", "layer_id", "layer_number", "idx")]
        found.append((name, type(part), tuple(sizes), tuple(settings)))
    return tuple(found)


def _scalars(owner: object) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in sorted(vars(owner).items()) if v is None or isinstance(v, bool | int | float | str)]


def fill_buffers(model: Any, device: str = "cpu") -> None:
    """Give a skeleton the buffers that no checkpoint holds (rotary frequencies and the like), as loading does, once."""
    buffers = [(name, buffer) for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta]
    if not buffers:  # initialising leaves alone what was filled before, and would not fill new buffers either
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True  # so that what is missing is only the buffers made next
    for name, buffer in buffers:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device=device)
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()
