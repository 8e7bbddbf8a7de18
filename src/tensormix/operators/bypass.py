"""A stand-in for a whole block: the hidden states pass unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensormix.operators.base import did_you_mean

RETURNS = ("tensor", "tuple")


class Bypass(nn.Module):
    """What is left when a block is dropped: its residual stream.

    Args:
        returns: "tensor" or "tuple" (hidden states and None, for the attention weights), as the model's blocks do.
        attention_type: kept where the model chooses the attention mask of a block by this attribute.
        sentinel: the dotted name of the zero-size buffer. Named like a parameter of the dropped block, it stops a
            loader that does not know this operator and would else draw a random block (shape mismatch).

    Raises:
        ValueError: `returns` is neither of the two.
    """

    def __init__(self, *, returns: str = "tensor", attention_type: str | None = None, sentinel: str = "weight") -> None:
        super().__init__()
        if returns not in RETURNS:
            known = "'tensor' or 'tuple'"
            raise ValueError(f"Bypass: returns must be {known}, got {returns!r}{did_you_mean(returns, RETURNS)}")
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
        return (hidden_states, None) if self.returns == "tuple" else hidden_states

    @property
    def sizes(self) -> dict[str, Any]:
        """JSON-able constructor arguments."""
        attention_type = getattr(self, "attention_type", None)
        return {"returns": self.returns, "attention_type": attention_type, "sentinel": self.sentinel}

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-able description from which `build` makes a copy."""
        return {"operator": type(self).__name__, **self.sizes}

    @property
    def num_params(self) -> int:
        return 0

    @property
    def num_bits(self) -> int:
        return 0

    @property
    def macs_per_token(self) -> int:
        return 0

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.sizes.items())
