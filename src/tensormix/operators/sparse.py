"""A matrix whose entries are mostly zero, stored as its other entries and a few bits that say where they stand.

Shape letters (this file): as in `base`, G groups of M consecutive entries of a row (G M = O I), C codes.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear, computing_dtype, did_you_mean

UNSTRUCTURED = "unstructured"
GROUPED = {"2:4": (2, 4), "2:8": (2, 8), "3:8": (3, 8), "4:8": (4, 8)}  # N of every M consecutive entries of a row
PATTERNS = (UNSTRUCTURED, *GROUPED)


class Sparse(StructuredLinear):
    """W has `num_values` stored entries, every other entry is zero.

    `values` holds the entries row by row, `positions` where they stand, in the fewest bits of these codes:
      "unstructured": one bit for every entry of W, or, where there are so few that it takes less room (fewer than one
        in ceil(log2(O I))), the index of each value in W.flatten(), of ceil(log2(O I)) bits;
      "N:M": for every group which of the binomial(M, N) subsets is stored, of ceil(log2(binomial(M, N))) bits: 3 for
        2:4, 5 for 2:8, 6 for 3:8, 7 for 4:8. The subsets are counted in lexicographic order.
    Bit b of all codes is one row of `positions`, eight codes to a byte, the first in the lowest bit.

    The product writes W out and multiplies it like a dense matrix. On a CPU that beats a sparse product from a density
    of about one seventh on; the writing costs as much as the product for some hundred tokens. So `macs_per_token` is
    that of the dense matrix, and `num_values` would be that of hardware which skips the zeros.

    Raises:
        ValueError: the pattern is unknown or does not divide the rows, or does not allow `num_values`.
    """

    positions: Tensor

    def __init__(self, in_features: int, out_features: int, *, num_values: int, pattern: str = UNSTRUCTURED) -> None:
        super().__init__(in_features, out_features)
        check_pattern(pattern, in_features, out_features)
        _check_count(num_values, pattern, in_features, out_features)
        self.num_values, self.pattern = num_values, pattern
        self.values = nn.Parameter(torch.empty(num_values))
        planes, codes = self._code_sizes
        self.register_buffer("positions", torch.empty(planes, -(-codes // 8), dtype=torch.uint8))

    @classmethod
    def from_dense(cls, weight: Tensor, *, num_values: int, pattern: str = UNSTRUCTURED) -> Sparse:  # (O, I)
        """The nearest matrix of this pattern in the Frobenius norm: the largest entries stay as they are."""
        mask = largest(weight.detach().to(computing_dtype(weight)).abs(), num_values=num_values, pattern=pattern)
        return cls.from_mask(weight, mask, pattern=pattern)

    @classmethod
    def from_mask(cls, weight: Tensor, mask: Tensor, *, pattern: str = UNSTRUCTURED) -> Sparse:  # (O, I), (O, I)
        """The entries of `weight` where `mask` is true.

        Raises:
            ValueError: a group of the mask does not hold as many entries as the pattern says.
        """
        O, I = weight.shape
        op = cls(I, O, num_values=int(mask.sum()), pattern=pattern).to(weight)
        if pattern in GROUPED:
            kept, size = GROUPED[pattern]
            if bool((mask.reshape(-1, size).sum(1) != kept).any()):
                raise ValueError(f"Sparse: pattern {pattern} needs {kept} entries in every group, but the mask differs")
        with torch.no_grad():
            op.values.copy_(weight[mask])
            op.positions.copy_(_pack(op._codes(mask), op.positions.shape[0]))
        return op

    @property
    def mask(self) -> Tensor:  # (O, I)
        """True where an entry is stored."""
        read = _unpack(self.positions, self._code_sizes[1])
        if self.pattern in GROUPED:
            entries = _subsets(*GROUPED[self.pattern]).to(read.device)[read.long()]
        elif not self._indexed:
            entries = read.bool()
        else:
            entries = torch.zeros(self.in_features * self.out_features, dtype=torch.bool, device=read.device)
            entries[read.long()] = True
        return entries.view(self.out_features, self.in_features)

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        dense = self.values.new_zeros(self.out_features, self.in_features)
        return F.linear(x, dense.masked_scatter_(self.mask, self.values))

    def to_dense(self) -> Tensor:  # (O, I)
        zeros = self.values.new_zeros(self.out_features, self.in_features)
        return zeros.index_put(self.mask.nonzero(as_tuple=True), self.values)

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "num_values": self.num_values,
            "pattern": self.pattern,
        }

    @property
    def macs_per_token(self) -> int:
        return self.in_features * self.out_features

    @property
    def _code_sizes(self) -> tuple[int, int]:
        """Bits of a code, and how many codes there are."""
        entries = self.in_features * self.out_features
        if self.pattern in GROUPED:
            kept, size = GROUPED[self.pattern]
            return _bits(comb(size, kept)), entries // size
        return (_bits(entries), self.num_values) if self._indexed else (1, entries)

    @property
    def _indexed(self) -> bool:
        entries = self.in_features * self.out_features
        return self.pattern == UNSTRUCTURED and self.num_values * _bits(entries) < entries

    def _codes(self, mask: Tensor) -> Tensor:  # (O, I) -> (C,)
        if self.pattern in GROUPED:
            subsets = _subsets(*GROUPED[self.pattern]).to(mask.device)  # (binomial, M)
            powers = 1 << torch.arange(subsets.shape[1], device=mask.device)
            order = torch.zeros(1 << len(powers), dtype=torch.long, device=mask.device)
            order[(subsets * powers).sum(1)] = torch.arange(len(subsets), device=mask.device)
            return order[(mask.reshape(-1, len(powers)) * powers).sum(1)]
        return mask.flatten().nonzero()[:, 0] if self._indexed else mask.flatten()


def largest(scores: Tensor, *, num_values: int, pattern: str = UNSTRUCTURED) -> Tensor:  # (O, I) -> (O, I)
    """True at the largest scores: `num_values` of them, or N in every group; between equals the earlier ones win.

    Raises:
        ValueError: as `Sparse`.
    """
    O, I = scores.shape
    check_pattern(pattern, I, O)
    _check_count(num_values, pattern, I, O)
    if pattern in GROUPED:
        kept, size = GROUPED[pattern]
        ranks = scores.reshape(-1, size).argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros(ranks.shape, dtype=torch.bool, device=scores.device)
        return mask.scatter_(1, ranks[:, :kept], True).view(O, I)
    flat = scores.flatten()
    least = flat.kthvalue(flat.numel() - num_values + 1).values
    mask = flat > least
    equal = (flat == least).nonzero()[:, 0]
    mask[equal[: num_values - int(mask.sum())]] = True
    return mask.view(O, I)


def pattern_count(pattern: str, in_features: int, out_features: int) -> int:
    """How many entries an N:M pattern stores of a layer of these sizes."""
    kept, size = GROUPED[pattern]
    return in_features * out_features // size * kept


def check_pattern(pattern: str, in_features: int, out_features: int) -> None:
    """Raise ValueError unless a layer of these sizes can have this pattern."""
    if pattern not in PATTERNS:
        raise ValueError(
            f"Sparse: unknown pattern {pattern!r}{did_you_mean(pattern, PATTERNS)} Known: {', '.join(PATTERNS)}."
        )
    if pattern in GROUPED and in_features % GROUPED[pattern][1]:
        allowed = [UNSTRUCTURED, *(name for name, (_, size) in GROUPED.items() if in_features % size == 0)]
        raise ValueError(
            f"Sparse: pattern {pattern} needs in_features that {GROUPED[pattern][1]} divides, but the layer is "
            f"{in_features}x{out_features}; allowed there: {', '.join(allowed)}."
        )


def _check_count(num_values: int, pattern: str, in_features: int, out_features: int) -> None:
    layer = f"a {in_features}x{out_features} layer"
    if pattern in GROUPED:
        only = pattern_count(pattern, in_features, out_features)
        if num_values != only:
            raise ValueError(f"Sparse: pattern {pattern} stores {only} values of {layer}, not {num_values}")
    elif not 1 <= num_values <= in_features * out_features:
        limit = in_features * out_features
        raise ValueError(f"Sparse: num_values must be in 1..{limit} for {layer}, got {num_values}")


def _bits(num_codes: int) -> int:
    """ceil(log2(num_codes)), and at least 1."""
    return max(1, (num_codes - 1).bit_length())


def _subsets(kept: int, size: int) -> Tensor:  # (binomial(M, N), M)
    """All subsets of N among M as rows of truth values, in lexicographic order."""
    return torch.tensor([[i in chosen for i in range(size)] for chosen in combinations(range(size), kept)])


def _pack(codes: Tensor, planes: int) -> Tensor:  # (C,) -> (planes, ceil(C / 8))
    """Row b holds bit b of every code."""
    codes = codes.to(_code_dtype(planes))
    lanes = torch.arange(8, dtype=codes.dtype, device=codes.device)
    bytes_ = F.pad(codes, (0, -len(codes) % 8)).view(-1, 8)
    rows = [((bytes_ >> bit & 1) << lanes).sum(1, dtype=codes.dtype) for bit in range(planes)]
    return torch.stack(rows).to(torch.uint8)


def _unpack(packed: Tensor, num_codes: int) -> Tensor:  # (planes, ceil(C / 8)) -> (C,)
    dtype = _code_dtype(len(packed))
    lanes = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    codes = torch.zeros(num_codes, dtype=dtype, device=packed.device)
    for bit, row in enumerate(packed):
        codes |= (row[:, None] & lanes).bool().flatten()[:num_codes].to(dtype) << bit
    return codes


def _code_dtype(planes: int) -> torch.dtype:
    return torch.uint8 if planes <= 8 else torch.int64
