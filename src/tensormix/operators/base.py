"""What every structured operator is.

Shape letters used in this package:
  ... leading batch axes     N tokens     I in_features     O out_features     R rank
  d bond dimension     P, Q core input / output size     (letters of one file only: see that file)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tensormix.operators.cost import Cost, bits_of


class Operator(nn.Module, ABC):
    """What may stand in a model where something dense was: in the place of a matrix, of the matrices of all experts, or
    of a block; or beside those that use it (`Owner`).

    The constructor takes sizes and nothing else and leaves the parameters uninitialised; a fit or `load_state_dict`
    fills them. A bias belongs to the site: it is `None` until it is moved over, and neither `spec` nor `cost` mentions
    it.
    """

    # Whether it took the place of other weights, which its own are not. A module of the model itself that did, such as
    # a block that was fitted to several, has this among its own attributes.
    is_replacement: ClassVar[bool] = True

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """JSON-able constructor arguments: enough to rebuild an empty copy."""

    @property
    @abstractmethod
    def macs_per_token(self) -> int:
        """Multiply-accumulates for one token, exactly as a dispatcher-level counter sees them."""

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-able description from which `build` makes an empty copy."""
        return {"operator": type(self).__name__, **self.sizes}

    @property
    def num_params(self) -> int:
        """Stored numbers, of those that are stored as integers how many they stand for; without the bias."""
        packed = sum(getattr(part, "num_codes", 0) for part in self.modules())
        return packed + sum(p.numel() for name, p in self.named_parameters() if name != "bias")

    @property
    def num_bits(self) -> int:
        """Bits of everything that `state_dict` holds but the bias.

        Taken from the tensors themselves, so that no operator can forget a part of what it stores.
        """
        return bits_of({name: tensor for name, tensor in self.state_dict().items() if name != "bias"})

    @property
    def cost(self) -> Cost:
        """All costs in the dtypes that its tensors have; on meta too. Of a stack, for a token at one expert."""
        bits = self.num_bits
        return Cost(self.num_params, bits, self.macs_per_token, bits // 8)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.sizes.items())


class StructuredLinear(Operator):
    """y = x @ W.T + b, where W (O, I) is never stored dense.

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
    def bias_shape(self) -> tuple[int, ...]:
        return (self.out_features,)


Kind = TypeVar("Kind", bound=Operator)


def outermost(module: nn.Module, kind: type[Kind] = Operator, name: str = "") -> Iterator[tuple[str, Kind]]:
    """Every operator of this kind in `module`, itself included, that is not part of another such one, by its name."""
    if isinstance(module, kind):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from outermost(child, kind, f"{name}.{child_name}" if name else child_name)


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which fits are computed: fp64 for fp64 weights, fp32 for everything else."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a sentence: `, did you mean 'x'?` for the nearest known name, or a full stop when none is near."""
    near = get_close_matches(str(name), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else "."
