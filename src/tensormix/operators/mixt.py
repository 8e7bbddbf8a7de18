"""The tensor mixture MixT ("A general tensor-structured compression scheme for efficient large language models",
arXiv 2605.25344, Eq. 1), with a core bond of any size.

Shape letters (this file):
  d bond     L = d^(k-1), R = d^(num_branches-k) bonds that branch k passes through on the left / right
  P, Q core input / output size     I', O' padded sizes: I' = L * P * R, O' = L * Q * R
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensormix.kernels.mixt import mixt
from tensormix.operators.base import StructuredLinear, did_you_mean
from tensormix.operators.mixt_matching import Windows, match, window

PADDINGS = ("multiple", "power")


def under_autocast(x: Tensor, cores: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Both in the dtype that a dense product would take inside autocast, or as they are outside it."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, cores
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), [core.to(dtype) for core in cores]


class MixT(StructuredLinear):
    """W = 1/num_branches * sum_k  I_(d^(k-1)) ⊗ core_k ⊗ I_(d^(num_branches-k)), cropped to (O, I).

    Each branch acts on a window of neighbouring bonds and leaves the others alone. Only the outer `num_branches - 1`
    bonds on each side are ever passed through, so only they have dimension d; what lies between is one core bond of
    any size. `num_branches = 1` is the dense layer and is never padded.

    It stores num_branches * P * Q numbers and costs num_branches * P * Q * d^(num_branches-1) MACs per token; the
    windows overlap, so the map has only num_branches * P * Q - (num_branches-1) * (P/d) * (Q/d) degrees of freedom.

    Args:
        num_branches: N_T of the paper, at least 1.
        bond: d of the paper, at least 2.
        padding: "multiple" pads both sizes to the next multiple of d^(2(num_branches-1)), "power" (the paper's) to
            the next power of d. A square layer whose size is d^n, n >= num_branches, is not padded by either, even
            where windows of different branches then share left and right bonds.

    Raises:
        ValueError: an argument is out of range, or the layer is too small for `num_branches`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_branches: int, bond: int = 2, padding: str = "multiple"
    ) -> None:
        super().__init__(in_features, out_features)
        _check((in_features, out_features), num_branches, bond, padding)
        self.num_branches, self.bond, self.padding = num_branches, bond, padding
        in_padded, out_padded = _padded_sizes((in_features, out_features), num_branches, bond, padding)
        passed = bond ** (num_branches - 1)
        self.core_in, self.core_out = in_padded // passed, out_padded // passed
        for k in range(num_branches):
            self.register_parameter(f"core_{k}", nn.Parameter(torch.empty(self.core_out, self.core_in)))

    @classmethod
    def from_dense(cls, weight: Tensor, *, num_branches: int, bond: int = 2, padding: str = "multiple") -> MixT:
        """The least-squares optimum of ||weight - W||_F over the cores, `weight` (O, I): see `mixt_matching`."""
        O, I = weight.shape
        op = cls(I, O, num_branches=num_branches, bond=bond, padding=padding).to(weight)
        with torch.no_grad():
            for core, value in zip(op.cores, match(weight, op.windows, (op.core_out, op.core_in)), strict=True):
                core.copy_(value)
        return op

    @property
    def cores(self) -> list[Tensor]:
        """The parameters core_0, core_1, ..., each (Q, P)."""
        return [getattr(self, f"core_{k}") for k in range(self.num_branches)]

    @property
    def windows(self) -> Windows:
        """How many values each branch passes through: [(L, R), ...]."""
        return [(self.bond**k, self.bond ** (self.num_branches - 1 - k)) for k in range(self.num_branches)]

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self.multiply_by(self.cores, x)

    def multiply_by(self, cores: list[Tensor], x: Tensor) -> Tensor:  # K x (Q, P), (..., I) -> (..., O)
        """The product of a mixture of these sizes with other cores."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"MixT: the layer takes {self.in_features} features, got {x.shape[-1]}")
        x, cores = under_autocast(x, cores)
        rows = x.reshape(-1, self.in_features)
        return mixt(rows, cores, self.bond, self.out_features).view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> Tensor:  # (O, I)
        return self.dense_of(self.cores)

    def dense_of(self, cores: list[Tensor]) -> Tensor:  # K x (Q, P) -> (O, I)
        in_padded, out_padded = self._padded
        dense = cores[0].new_zeros(out_padded, in_padded)
        for core, (left, right) in zip(cores, self.windows, strict=True):
            window(dense, left, right).add_((core / self.num_branches)[..., None, None])
        return dense[: self.out_features, : self.in_features]

    @property
    def _padded(self) -> tuple[int, int]:  # I', O'
        passed = self.bond ** (self.num_branches - 1)
        return self.core_in * passed, self.core_out * passed

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "num_branches": self.num_branches,
            "bond": self.bond,
            "padding": self.padding,
        }

    @property
    def macs_per_token(self) -> int:
        return self.num_branches * self.core_in * self.core_out * self.bond ** (self.num_branches - 1)


def largest_num_branches(in_features: int, out_features: int, *, bond: int = 2, padding: str = "multiple") -> int:
    """The largest `num_branches` that MixT takes for a layer of these sizes."""
    exponent = _exponent(in_features, bond)
    if in_features == out_features == bond**exponent:
        return max(1, exponent)
    if padding == "power":
        shorter = _exponent(min(in_features, out_features), bond)
    else:
        shorter = _exponent(min(in_features, out_features) + 1, bond) - 1  # rounded down
    return shorter // 2 + 1


def _exponent(size: int, bond: int) -> int:
    """The smallest n with bond**n >= size."""
    n = 0
    while bond**n < size:
        n += 1
    return n


def _padded_sizes(sizes: tuple[int, int], num_branches: int, bond: int, padding: str) -> tuple[int, int]:
    """I' and O' for (I, O), which must allow `num_branches`."""
    square = sizes[0] == sizes[1] == bond ** _exponent(sizes[0], bond)
    if num_branches == 1 or square:
        return sizes
    if padding == "power":
        return bond ** _exponent(sizes[0], bond), bond ** _exponent(sizes[1], bond)
    unit = bond ** (2 * (num_branches - 1))
    return -(-sizes[0] // unit) * unit, -(-sizes[1] // unit) * unit


def _check(sizes: tuple[int, int], num_branches: int, bond: int, padding: str) -> None:
    for name, value, least in (("bond", bond, 2), ("num_branches", num_branches, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"MixT: {name} must be a whole number of at least {least}, got {value!r}.")
    if padding not in PADDINGS:
        known = "'multiple' or 'power'"
        raise ValueError(f"MixT: padding must be {known}, got {padding!r}{did_you_mean(padding, PADDINGS)}")
    largest = largest_num_branches(*sizes, bond=bond, padding=padding)
    if num_branches > largest:
        raise ValueError(
            f"MixT: num_branches={num_branches} is too large for a {sizes[0]}x{sizes[1]} layer with bond {bond}; "
            f"the largest possible is {largest}."
        )
