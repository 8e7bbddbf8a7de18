"""Stand-ins for a whole block: the simplest lets the hidden states pass unchanged."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.operators.base import Operator, did_you_mean

RETURNS = ("tensor", "tuple")


class StandIn(Operator):
    """What a block is replaced with as a whole: hidden states in, hidden states out.

    Args:
        returns: "tensor" or "tuple" (hidden states and None, for the attention weights), as the model's blocks do.
        attention_type: kept where the model chooses the attention mask of a block by this attribute.
        sentinel: the dotted name of the zero-size buffer. Named like a parameter of the block, it stops a loader that
            does not know this operator and would else draw a random block (shape mismatch).

    Raises:
        ValueError: `returns` is neither of the two.
    """

    def __init__(self, *, returns: str = "tensor", attention_type: str | None = None, sentinel: str = "weight") -> None:
        super().__init__()
        if returns not in RETURNS:
            known = "'tensor' or 'tuple'"
            raise ValueError(
                f"{type(self).__name__}: returns must be {known}, got {returns!r}{did_you_mean(returns, RETURNS)}"
            )
        self.returns, self.sentinel = returns, sentinel
        if attention_type is not None:
            self.attention_type = attention_type
        *path, leaf = sentinel.split(".")
        owner: nn.Module = self
        for name in path:
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.register_buffer(leaf, torch.empty(0))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        out = self.stand_in(hidden_states)
        return (out, None) if self.returns == "tuple" else out

    @abstractmethod
    def stand_in(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """What the block passes on."""

    @property
    def sizes(self) -> dict[str, Any]:
        attention_type = getattr(self, "attention_type", None)
        return {"returns": self.returns, "attention_type": attention_type, "sentinel": self.sentinel}


class Bypass(StandIn):
    """What is left when a block is dropped: its residual stream."""

    def stand_in(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return hidden

    @property
    def macs_per_token(self) -> int:
        return 0
