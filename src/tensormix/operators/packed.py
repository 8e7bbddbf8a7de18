"""Numbers stored as small integers with scales, and how the integers are packed.

Shape letters (this file):
  M rows     K numbers per row     A rows of scales: M, or 1 where a whole parameter shares one
  L numbers per row of scales     G numbers that share a scale     S scales per row     C codes     B bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import computing_dtype

WORDS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> how many codes fill whole bytes, and how many bytes
SCALE_DTYPE = torch.bfloat16  # the range of fp32: no scale of a real weight overflows or vanishes


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
    packed like the codes; with more `zero_bits` than `bits` it may lie between codes, a multiple of
    2^(bits - zero_bits). The scales stay bfloat16 when the module is cast: rounded again they would move every number.
    """

    codes: Tensor  # (B,) uint8
    scales: Tensor  # (A, S) bfloat16
    zeros: Tensor | None  # (B,) uint8

    def __init__(
        self, shape: Sequence[int], *, bits: int, group: int | str, symmetric: bool, zero_bits: int | None = None
    ) -> None:
        super().__init__()
        self.zero_bits = bits if zero_bits is None else zero_bits
        self.shape, self.bits, self.middle = tuple(shape), bits, 2 ** (bits - 1) - 1
        self.num_codes = prod(shape)
        self.length = self.num_codes if group == "tensor" else self.shape[-1]  # L
        self.width = min(group, self.length) if isinstance(group, int) else self.length  # G
        scales = torch.empty(self.num_codes // self.length, -(-self.length // self.width), dtype=SCALE_DTYPE)  # (A, S)
        zero_bytes = num_packed_bytes(scales.numel(), self.zero_bits)
        zeros = None if symmetric else torch.empty(zero_bytes, dtype=torch.uint8)
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

    def grid(self, low: Tensor, high: Tensor, covers: bool = True) -> tuple[Tensor, Tensor]:  # (A, S) each
        """Scales and zeros, in the dtype of what is given, of groups whose numbers go from `low` to `high`.

        `covers` says that neither end may be missed by more than half a scale.
        """
        low, high = low.clamp_max(0), high.clamp_min(0)
        steps = self.middle if self.zeros is None else 2**self.bits - 1
        exact = (torch.maximum(high, -low) if self.zeros is None else high - low) / steps
        exact = exact.clamp_min(torch.finfo(SCALE_DTYPE).tiny)
        # To the nearest, the largest number moves by at most steps / 256 codes: less than half a code of 127, but not
        # of 255, so asymmetric scales are rounded up.
        scales = exact.to(SCALE_DTYPE)
        if self.zeros is not None and covers:
            above = torch.nextafter(scales, torch.full_like(scales, torch.inf))
            scales = torch.where(scales < exact, above, scales)
        if not scales.isfinite().all():
            raise ValueError("it holds NaN or infinite values, or ones above 3e38, which have no bfloat16 scale")
        scales = scales.to(low.dtype)
        if self.zeros is None:
            return scales, torch.full_like(scales, self.middle)
        return scales, (-low / scales * self.parts).round().clamp_max(2**self.zero_bits - 1) / self.parts

    @property
    def parts(self) -> int:
        """Into how many parts zeros cut the step from one code to the next."""
        return 2 ** (self.zero_bits - self.bits)

    def nearest(self, wide: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:  # (A, S, G), (A, S), (A, S) -> (A, S, G)
        """The codes whose numbers are nearest."""
        whole = zeros.floor()
        return ((wide / scales[..., None] + (zeros - whole)[..., None]).round() + whole[..., None]).clamp(0, self.top)

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
            self.zeros.copy_(pack((zeros * self.parts).flatten(), self.zero_bits))

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
            zeros = unpack(self.zeros, self.zero_bits, self.scales.numel())
            codes = codes - zeros.view(*self.scales.shape, 1).to(wide) / self.parts
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
