"""Any operator with small integers for its parameters, and how they are stored.

Shape letters (this file):
  M rows     K numbers per row     A rows of scales: M, or 1 where a whole parameter shares one
  L numbers per row of scales     G numbers that share a scale     S scales per row     C codes     B bytes
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype, did_you_mean
from tensormix.operators.shared import View

WORDS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> how many codes fill whole bytes, and how many bytes
GROUPS = ("channel", "tensor")
SCALE_DTYPE = torch.bfloat16  # the range of fp32: no scale of a real weight overflows or vanishes

Module = TypeVar("Module", bound=nn.Module)


def pack(codes: Tensor, bits: int) -> Tensor:  # (C,) integers in 0..2^bits-1 -> (B,)
    """`bits` bits of each code, the first one lowest, as uint8; the last word is filled with zeros."""
    count, size = WORDS[bits]
    words = F.pad(codes, (0, -len(codes) % count)).view(-1, count).to(torch.int32)
    words = (words << torch.arange(0, 8 * size, bits, device=codes.device)).sum(1, keepdim=True)
    return (words >> torch.arange(0, 8 * size, 8, device=codes.device) & 255).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:  # (B,) -> (C,)
    """The codes that `pack` was given, as uint8."""
    _, size = WORDS[bits]
    words = packed.view(-1, size)
    if size > 1:
        places = torch.arange(0, 8 * size, 8, device=packed.device, dtype=torch.int32)
        words = (words.to(torch.int32) << places).sum(1, keepdim=True, dtype=torch.int32)
    places = torch.arange(0, 8 * size, bits, device=packed.device, dtype=words.dtype)
    return (words >> places & 2**bits - 1).flatten()[:num_codes].to(torch.uint8)


def num_packed_bytes(num_codes: int, bits: int) -> int:
    count, size = WORDS[bits]
    return -(-num_codes // count) * size


class Packed(nn.Module):
    """Numbers (..., K), M rows in all, that are (code - zero) * scale, the codes being integers in 0..2^bits-1.

    Symmetric, zero is 2^(bits-1) - 1 and the last code is never used. Asymmetric, every scale has a zero of its own,
    packed like the codes. The scales stay bfloat16 when the module is cast: rounded again they would move every number.
    """

    codes: Tensor  # (B,) uint8
    scales: Tensor  # (A, S) bfloat16
    zeros: Tensor | None  # (B,) uint8

    def __init__(self, shape: Sequence[int], *, bits: int, group: int | str, symmetric: bool) -> None:
        super().__init__()
        self.shape, self.bits, self.middle = tuple(shape), bits, 2 ** (bits - 1) - 1
        self.num_codes = prod(shape)
        self.length = self.num_codes if group == "tensor" else self.shape[-1]  # L
        self.width = min(group, self.length) if isinstance(group, int) else self.length  # G
        scales = torch.empty(self.num_codes // self.length, -(-self.length // self.width), dtype=SCALE_DTYPE)  # (A, S)
        zeros = None if symmetric else torch.empty(num_packed_bytes(scales.numel(), bits), dtype=torch.uint8)
        self.register_buffer("codes", torch.empty(num_packed_bytes(self.num_codes, bits), dtype=torch.uint8))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    @torch.no_grad()
    def round(self, given: Tensor) -> None:  # (..., K)
        """Take the numbers nearest to those given: none moves by more than half its scale.

        Symmetric, scale = max|number| / (2^(bits-1) - 1); asymmetric, (max - min) / (2^bits - 1), where 0 counts as a
        number so that it has a code. Computed per group in at least fp32. A group of zeros gets the smallest scale.

        Raises:
            ValueError: a number is NaN, infinite, or too large for any scale.
        """
        wide = self.grouped(given.to(computing_dtype(given)))  # (A, S, G)
        scales, zeros = self.grid(wide.amin(-1), wide.amax(-1))
        self.put(scales, zeros, self.nearest(wide, scales, zeros).flatten(1)[:, : self.length])

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:  # (A, S) each
        """Scales and zeros, in the dtype of what is given, of groups whose numbers go from `low` to `high`."""
        low, high = low.clamp_max(0), high.clamp_min(0)
        steps = self.middle if self.zeros is None else 2**self.bits - 1
        exact = (torch.maximum(high, -low) if self.zeros is None else high - low) / steps
        exact = exact.clamp_min(torch.finfo(SCALE_DTYPE).tiny)
        # To the nearest, the largest number moves by at most steps / 256 codes: less than half a code of 127, but not
        # of 255, so asymmetric scales are rounded up.
        scales = exact.to(SCALE_DTYPE)
        if self.zeros is not None:
            above = torch.nextafter(scales, torch.full_like(scales, torch.inf))
            scales = torch.where(scales < exact, above, scales)
        if not scales.isfinite().all():
            raise ValueError("it holds NaN or infinite values, or ones above 3e38, which have no bfloat16 scale")
        scales = scales.to(low.dtype)
        return scales, torch.full_like(scales, self.middle) if self.zeros is None else (-low / scales).round()

    def nearest(self, wide: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:  # (A, S, G), (A, S), (A, S) -> (A, S, G)
        """The codes whose numbers are nearest."""
        return ((wide / scales[..., None]).round() + zeros[..., None]).clamp(0, self.top)

    @property
    def top(self) -> int:
        """The largest code in use."""
        return 2 * self.middle if self.zeros is None else 2**self.bits - 1

    @torch.no_grad()
    def put(self, scales: Tensor, zeros: Tensor, codes: Tensor) -> None:  # (A, S), (A, S), M * K numbers
        """Take this grid and these codes on it."""
        self.scales.copy_(scales)
        self.codes.copy_(pack(codes.flatten(), self.bits))
        if self.zeros is not None:
            self.zeros.copy_(pack(zeros.flatten(), self.bits))

    def forward(self, dtype: torch.dtype) -> Tensor:  # (..., K)
        """`numbers`. Whoever brings what a module holds when it is called brings it for this."""
        return self.numbers(dtype)

    def numbers(self, dtype: torch.dtype) -> Tensor:  # (..., K)
        """What the codes stand for, rounded once to `dtype`."""
        wide = torch.promote_types(dtype, SCALE_DTYPE)  # fp32 for fp16, in which not every scale can be written
        codes = self.grouped(unpack(self.codes, self.bits, self.num_codes)).to(wide)  # (A, S, G)
        if self.zeros is None:
            codes = codes - self.middle
        else:
            zeros = unpack(self.zeros, self.bits, self.scales.numel())
            codes = codes - zeros.view(*self.scales.shape, 1).to(wide)
        numbers = (codes * self.scales.to(wide)[..., None]).to(dtype)
        return numbers.flatten(1)[:, : self.length].reshape(self.shape)

    def grouped(self, numbers: Tensor) -> Tensor:  # M * K numbers -> (A, S, G)
        """With zeros behind a short last group."""
        short = -self.length % self.width
        return F.pad(numbers.reshape(-1, self.length), (0, short)).view(*self.scales.shape, self.width)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Packed:
        self.scales = self.scales.view(torch.int16)  # seen as integers they are moved, but not cast
        super()._apply(fn, recurse)
        self.scales = self.scales.view(SCALE_DTYPE)
        return self


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

    Raises:
        ValueError: `bits` or `group` is not one of these, or `inner` is quantized already.
    """

    inner: StructuredLinear

    def __init__(
        self, *, inner: StructuredLinear, bits: int, group: int | str = "channel", symmetric: bool = True
    ) -> None:
        _check(inner, bits, group)
        super().__init__(inner.in_features, inner.out_features)
        self.bits, self.group, self.symmetric = bits, group, symmetric
        object.__setattr__(self, "inner", on_meta(inner))  # not a submodule: its numbers are neither stored nor moved
        self.inner.bias = None
        parameters = dict(self.inner.named_parameters())
        for name, tensor in self.inner.state_dict().items():
            if name in parameters and tensor.numel():
                self.add_module(_place(name), Packed(tensor.shape, bits=bits, group=group, symmetric=symmetric))
            elif tensor.numel():
                self.register_buffer(_place(name), torch.empty(tensor.shape, dtype=tensor.dtype))

    @classmethod
    def of(
        cls, operator: StructuredLinear, *, bits: int, group: int | str = "channel", symmetric: bool = True
    ) -> Quantized:
        """`operator` rounded to nearest; its bias moves over.

        Raises:
            ValueError: a parameter holds NaN or infinite values; or as the constructor.
        """
        with operator.weight.device:
            op = cls(inner=operator, bits=bits, group=group, symmetric=symmetric)
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
        return {"inner": self.inner.spec, "bits": self.bits, "group": self.group, "symmetric": self.symmetric}

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


def _check(inner: StructuredLinear, bits: int, group: int | str) -> None:
    if type(bits) is not int or bits not in WORDS:
        raise ValueError(f"Quantized: bits must be 2, 3, 4 or 8, got {bits!r}.")
    if not (group in GROUPS if isinstance(group, str) else type(group) is int and group >= 1):
        known = "'channel', 'tensor' or a whole number of at least 1"
        raise ValueError(f"Quantized: group must be {known}, got {group!r}{did_you_mean(group, GROUPS)}")
    if isinstance(inner, View):
        raise ValueError("Quantized: a View holds no numbers; quantise what its owner is made of")
    if any(isinstance(part, Packed) for part in inner.modules()):
        raise ValueError(f"Quantized: the {type(inner).__name__} is quantized already; take the one it was made of")
