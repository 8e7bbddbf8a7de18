"""A small stand-in for a whole block, or for several: one hidden layer beside the residual stream.

Shape letters (this file): D hidden size, M hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.bypass import StandIn


class ResidualMLP(StandIn):
    """h + down silu(up h).

    As silu(z) - silu(-z) = z, pairs of units with opposite signs hold any linear map of half as many dimensions.

    Args:
        hidden_size: D.
        width: M.
        returns, attention_type, sentinel, attributes, buffers: as of `Bypass`.

    Raises:
        ValueError: a size is below 1, or `returns` is not known.
    """

    def __init__(
        self, hidden_size: int, width: int, *, returns: str = "tensor", attention_type: str | None = None,
        sentinel: str = "weight", attributes: Mapping[str, Any] | None = None,
        buffers: Mapping[str, Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            returns=returns, attention_type=attention_type, sentinel=sentinel, attributes=attributes, buffers=buffers
        )
        if hidden_size < 1 or width < 1:
            raise ValueError(f"ResidualMLP: hidden_size and width must be at least 1, got {hidden_size}, {width}")
        self.hidden_size, self.width = hidden_size, width
        self.up = nn.Parameter(torch.empty(width, hidden_size))  # (M, D)
        self.down = nn.Parameter(torch.empty(hidden_size, width))  # (D, M)

    def stand_in(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return hidden + F.linear(F.silu(F.linear(hidden, self.up)), self.down)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"hidden_size": self.hidden_size, "width": self.width, **super().sizes}

    @property
    def macs_per_token(self) -> int:
        return 2 * self.hidden_size * self.width
