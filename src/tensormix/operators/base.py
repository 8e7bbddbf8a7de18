"""What every structured operator is.

Shape letters used in this package:
  ... leading batch axes     N tokens     I in_features     O out_features     R rank
  d bond dimension     P, Q core input / output size     (letters of one file only: see that file)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn


class StructuredLinear(nn.Module, ABC):
    """y = x @ W.T + b, where W (O, I) is never stored dense.

    The constructor takes sizes and nothing else and leaves the parameters uninitialised; `from_dense` and
    `load_state_dict` fill them. The bias belongs to the site: it is `None` here until it is moved over, and neither
    `spec` nor `num_params` mentions it.

    The zero-size buffer `weight` is saved with the parameters. A loader that does not know this operator expects a
    dense `weight` under the same name and stops at the mismatch, where it would else draw a random layer.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            name = type(self).__name__
            raise ValueError(
                f"{name}: in_features and out_features must be at least 1, got {in_features}, {out_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self.register_buffer("weight", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """x @ W.T without forming W."""

    @abstractmethod
    def to_dense(self) -> Tensor:  # (O, I)
        """W itself, written independently of `multiply` and differentiable: tests compare the two."""

    @classmethod
    @abstractmethod
    def from_dense(cls, weight: Tensor, **sizes: Any) -> StructuredLinear:  # (O, I)
        """The operator of these sizes nearest to `weight`, on its device, in its dtype; computed in at least fp32."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """JSON-able constructor arguments: enough to rebuild an empty copy."""

    @property
    @abstractmethod
    def macs_per_token(self) -> int:
        """Multiply-accumulates of `multiply` for one token, exactly as a dispatcher-level counter sees them."""

    @property
    def num_params(self) -> int:
        """Stored numbers of the structure; the bias, which belongs to the site, is not counted."""
        packed = sum(getattr(part, "num_codes", 0) for part in self.modules())  # numbers that are stored as integers
        return packed + sum(p.numel() for p in self.parameters() if p is not self.bias)

    @property
    def num_bits(self) -> int:
        """Bits of everything that `state_dict` holds but the bias, which belongs to the site.

        Taken from the tensors themselves, so that no operator can forget a part of what it stores.
        """
        stored = (tensor for name, tensor in self.state_dict().items() if name != "bias")
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-able description from which `build` makes an empty copy."""
        return {"operator": type(self).__name__, **self.sizes}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.sizes.items())


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which fits are computed: fp64 for fp64 weights, fp32 for everything else."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a sentence: `, did you mean 'x'?` for the nearest known name, or a full stop when none is near."""
    near = get_close_matches(str(name), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else "."
