"""Stand-ins for a whole block: the simplest lets the hidden states pass unchanged."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.operators.base import Operator, did_you_mean

_RETURNS = re.compile(r"tensor|tuple( of ([1-9]\d*))?")


class StandIn(Operator):
    """What a block is replaced with as a whole: hidden states in, hidden states out.

    Args:
        returns: "tensor", "tuple" (the hidden states and None, for the attention weights) or "tuple of N" (the hidden
            states and N - 1 times None), as the model's blocks do.
        attention_type: kept where the model chooses the attention mask of a block by this attribute.
        sentinel: the dotted name of the zero-size buffer. Named like a parameter of the block, it stops a loader that
            does not know this operator and would else draw a random block (shape mismatch).
        attributes: what else the model reads of its blocks: strings, numbers and truth values.
        buffers: name -> shape of what the model fills inside its blocks when it is loaded; nothing here uses it.

    Raises:
        ValueError: `returns` is none of these.
    """

    def __init__(
        self, *, returns: str = "tensor", attention_type: str | None = None, sentinel: str = "weight",
        attributes: Mapping[str, Any] | None = None, buffers: Mapping[str, Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        found = _RETURNS.fullmatch(returns) if isinstance(returns, str) else None
        if found is None:
            known = "'tensor', 'tuple' or 'tuple of N'"
            hint = did_you_mean(returns, ("tensor", "tuple"))
            raise ValueError(f"{type(self).__name__}: returns must be {known}, got {returns!r}{hint}")
        self.returns, self.sentinel = returns, sentinel
        self._beside = None if returns == "tensor" else int(found[2] or 2) - 1
        if attention_type is not None:
            self.attention_type = attention_type
        self.attributes: dict[str, Any] = {}
        self.keep(attributes or {})
        self._register(sentinel, torch.empty(0))
        self.buffer_shapes: dict[str, list[int]] = {}
        self.keep({}, buffers or {})

    def _register(self, path: str, value: Tensor, persistent: bool = True) -> None:
        *names, leaf = path.split(".")
        owner: nn.Module = self
        for name in names:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.register_buffer(leaf, value, persistent=persistent)

    def keep(self, attributes: Mapping[str, Any], buffers: Mapping[str, Sequence[int]] | None = None) -> None:
        """Have these attributes and buffers too, unless there are some of these names."""
        for path, shape in (buffers or {}).items():
            if path not in self.buffer_shapes:
                self.buffer_shapes[path] = list(shape)
                self._register(path, torch.zeros(*shape), persistent=False)
        for name, value in attributes.items():
            if not hasattr(self, name):
                self.attributes[name] = value
                setattr(self, name, value)

    def as_bypass(self) -> Bypass:
        """What lets everything pass and is called, and returns, as this does."""
        return Bypass(**self._place)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.stand_in(hidden_states)
        return out if self._beside is None else (out, *(None for _ in range(self._beside)))

    @abstractmethod
    def stand_in(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """What the block passes on."""

    @property
    def sizes(self) -> dict[str, Any]:
        return self._place

    @property
    def _place(self) -> dict[str, Any]:
        attention_type = getattr(self, "attention_type", None)
        more: dict[str, Any] = {"attributes": self.attributes} if self.attributes else {}
        more |= {"buffers": self.buffer_shapes} if self.buffer_shapes else {}
        return {"returns": self.returns, "attention_type": attention_type, "sentinel": self.sentinel, **more}


class Bypass(StandIn):
    """What is left when a block is dropped: its residual stream."""

    def stand_in(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return hidden

    @property
    def macs_per_token(self) -> int:
        return 0
