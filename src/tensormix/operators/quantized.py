"""Any operator with small integers for its parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tensormix.operators.base import StructuredLinear, did_you_mean
from tensormix.operators.packed import WORDS, Packed
from tensormix.operators.shared import View

GROUPS = ("channel", "tensor")

Module = TypeVar("Module", bound=nn.Module)


class Quantized(StructuredLinear):
    """The inner operator, the numbers of its parameters rounded to multiples of bfloat16 scales.

    Everything else that it stores (permutations, masks) is kept as it is. The integers are no parameters: they do not
    train, and only the bias has a gradient; `dequantized` gives an operator that trains. `multiply` makes each matrix
    anew for every call, in the dtype of its input; `to_dense` answers in the dtype of the empty buffer `weight`.

    Args:
        inner: the operator whose sizes are meant; its numbers are not read (`of` rounds them).
        bits: of one integer: 2, 3, 4 or 8.
        group: what shares a scale: so many neighbours in a row (the last group of a row may be shorter, and a shorter
            row is one group), a row ("channel"), or a whole parameter ("tensor"). A parameter of one axis is one row.
        symmetric: no zero points, and 2^bits - 1 values around 0; otherwise 2^bits between the smallest and largest.
        zero_bits: of one zero point, as `bits` or 8; None: as many as `bits`, so that the number 0 has a code.

    Raises:
        ValueError: `bits`, `group` or `zero_bits` is not one of these, or `inner` is quantized already.
    """

    inner: StructuredLinear

    def __init__(
        self, *, inner: StructuredLinear, bits: int, group: int | str = "channel", symmetric: bool = True,
        zero_bits: int | None = None,
    ) -> None:  # fmt: skip
        _check(inner, bits, group, symmetric, zero_bits)
        super().__init__(inner.in_features, inner.out_features)
        self.bits, self.group, self.symmetric, self.zero_bits = bits, group, symmetric, zero_bits
        object.__setattr__(self, "inner", on_meta(inner))  # not a submodule: its numbers are neither stored nor moved
        self.inner.bias = None
        parameters = dict(self.inner.named_parameters())
        for name, tensor in self.inner.state_dict().items():
            if name in parameters and tensor.numel():
                sizes = {"bits": bits, "group": group, "symmetric": symmetric, "zero_bits": zero_bits}
                self.add_module(_place(name), Packed(tensor.shape, **sizes))
            elif tensor.numel():
                self.register_buffer(_place(name), torch.empty(tensor.shape, dtype=tensor.dtype))

    @classmethod
    def of(
        cls, operator: StructuredLinear, *, bits: int, group: int | str = "channel", symmetric: bool = True,
        zero_bits: int | None = None,
    ) -> Quantized:  # fmt: skip
        """`operator` rounded to nearest; its bias moves over.

        Raises:
            ValueError: a parameter holds NaN or infinite values; or as the constructor.
        """
        with operator.weight.device:
            op = cls(inner=operator, bits=bits, group=group, symmetric=symmetric, zero_bits=zero_bits)
        op.weight, op.bias = torch.empty_like(operator.weight), operator.bias
        numbers = operator.state_dict()
        for name in op.inner.state_dict():
            part = op._stored(name)
            if isinstance(part, Packed):
                try:
                    part.round(numbers[name])
                except ValueError as error:
                    kind = type(operator).__name__
                    raise ValueError(f"Quantized: {name} of the {kind} cannot be rounded: {error}") from None
            elif part is not None:
                part.copy_(numbers[name])
        return op

    @classmethod
    def from_dense(
        cls, weight: Tensor, *, inner_type: type[StructuredLinear], bits: int, group: int | str = "channel",
        symmetric: bool = True, **sizes: Any,
    ) -> Quantized:  # fmt: skip
        """`inner_type.from_dense(weight, **sizes)`, `weight` (O, I), rounded to nearest.

        Each step is the best of its kind; the two together are near the best, not the best.
        """
        return cls.of(inner_type.from_dense(weight, **sizes), bits=bits, group=group, symmetric=symmetric)

    def dequantized(self) -> StructuredLinear:
        """The inner operator with what the integers stand for as its parameters, and with this very bias."""
        op = copy.deepcopy(self.inner)
        numbers = {name: part.clone() for name, part in self._numbers(self.weight.dtype).items()}
        op.load_state_dict(numbers, assign=True)
        op.bias = self.bias
        return op

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return functional_call(self.inner, self._numbers(x.dtype), (x,))

    def to_dense(self) -> Tensor:  # (O, I)
        return self.dequantized().to_dense().detach()

    def packed(self) -> Iterator[tuple[str, Packed]]:
        """The integers that stand for each parameter of the inner operator, by its name there."""
        for name in self.inner.state_dict():
            part = self._stored(name)
            if isinstance(part, Packed):
                yield name, part

    def _stored(self, name: str) -> Packed | Tensor | None:
        """What stands here for the inner operator's tensor `name`; None for an empty one."""
        return None if name == "weight" else getattr(self, _place(name), None)

    def _numbers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state of the inner operator, its parameters in `dtype`."""
        numbers = {}
        for name, tensor in self.inner.state_dict().items():
            part = self._stored(name)
            if part is None:
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                part = torch.empty(tensor.shape, dtype=kind, device=self.weight.device)
            numbers[name] = part(dtype) if isinstance(part, Packed) else part
        return numbers

    @property
    def sizes(self) -> dict[str, Any]:
        sizes = {"inner": self.inner.spec, "bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        return sizes if self.zero_bits is None else {**sizes, "zero_bits": self.zero_bits}

    @property
    def macs_per_token(self) -> int:
        return self.inner.macs_per_token


def on_meta(module: Module) -> Module:
    """A copy of `module` with its shapes and dtypes and without its numbers."""
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def _place(name: str) -> str:
    """The name here of the inner operator's tensor `name`: what a module holds itself has no dots in its name."""
    return name.replace(".", "_")


def _check(inner: StructuredLinear, bits: int, group: int | str, symmetric: bool, zero_bits: int | None) -> None:
    if type(bits) is not int or bits not in WORDS:
        raise ValueError(f"Quantized: bits must be 2, 3, 4 or 8, got {bits!r}.")
    if not (group in GROUPS if isinstance(group, str) else type(group) is int and group >= 1):
        known = "'channel', 'tensor' or a whole number of at least 1"
        raise ValueError(f"Quantized: group must be {known}, got {group!r}{did_you_mean(group, GROUPS)}")
    if zero_bits is not None and (symmetric or zero_bits not in (bits, 8)):
        reason = "has no meaning with symmetric" if symmetric else f"must be {bits}, as bits, or 8"
        raise ValueError(f"Quantized: zero_bits {reason}, got {zero_bits!r}.")
    if isinstance(inner, View):
        raise ValueError("Quantized: a View holds no numbers; quantise what its owner is made of")
    if any(isinstance(part, Packed) for part in inner.modules()):
        raise ValueError(f"Quantized: the {type(inner).__name__} is quantized already; take the one it was made of")
