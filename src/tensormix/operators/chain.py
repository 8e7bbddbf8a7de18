"""Several operators one after another.

Shape letters: n size between two factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormix.operators.base import StructuredLinear
from tensormix.operators.joint_fit import fit_jointly


class Chain(StructuredLinear):
    """W = F_1 Π F_2 Π ... F_K: the last factor sees the input.

    Π is the perfect shuffle between two factors: entry a * (n / shuffle) + b of what the right one gives becomes entry
    b * shuffle + a of what the left one gets, so that bonds which were neighbours no longer are. 1 leaves the order.

    Raises:
        ValueError: there are no factors, two neighbours differ in size, or `shuffle` does not divide a size between.
    """

    def __init__(self, *, factors: Sequence[StructuredLinear], shuffle: int = 1) -> None:
        if not factors:
            raise ValueError("Chain: needs one or more factors, got none")
        for left, right in pairwise(factors):
            if left.in_features != right.out_features:
                raise ValueError(
                    f"Chain: a factor with {left.in_features} inputs cannot follow one with {right.out_features} "
                    "outputs"
                )
            if shuffle < 1 or left.in_features % shuffle:
                between = f"the {left.in_features} values between two factors"
                raise ValueError(f"Chain: shuffle must divide {between}, got {shuffle}")
        super().__init__(factors[-1].in_features, factors[0].out_features)
        self.factors, self.shuffle = nn.ModuleList(factors), shuffle

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        *,
        factors: Sequence[tuple[type[StructuredLinear], dict[str, Any]]],
        shuffle: int = 1,
        steps: int = 200,
        seed: int = 0,
    ) -> Chain:
        """A chain near `weight` (O, I): each factor is (operator class, its constructor arguments).

        The problem has many valleys; this is the floor of the one that `start_chain` begins in.
        """
        wide = weight.detach().double()
        op = cls(factors=[kind(**sizes) for kind, sizes in factors], shuffle=shuffle).to(wide)
        start_chain(op, wide, seed)
        fit_jointly(op, wide, None, steps=steps)
        return op.to(weight)

    def as_list(self) -> list[StructuredLinear]:
        """The factors, the leftmost first."""
        return [cast(StructuredLinear, factor) for factor in self.factors]

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        first, *others = reversed(self.as_list())
        y = first(x)
        for factor in others:
            if self.shuffle > 1:
                y = y.unflatten(-1, (self.shuffle, -1)).transpose(-1, -2).flatten(-2)
            y = factor(y)
        return y

    def to_dense(self) -> Tensor:  # (O, I)
        dense, *others = [factor.to_dense() for factor in self.as_list()]
        for factor in others:
            n = len(factor)
            places = torch.arange(n, device=factor.device)
            came_from = places % self.shuffle * (n // self.shuffle) + places // self.shuffle
            dense = dense @ factor[came_from]
        return dense

    @property
    def sizes(self) -> dict[str, Any]:
        return {"factors": [factor.spec for factor in self.as_list()], "shuffle": self.shuffle}

    @property
    def macs_per_token(self) -> int:
        return sum(factor.macs_per_token for factor in self.as_list())


@torch.no_grad()
def start_chain(op: Chain, weight: Tensor, seed: int) -> None:  # (O, I)
    """Where fits of a chain begin: square factors near the identity, the others random; mixtures as large as `weight`.

    At the identity itself all factors would be alike and stay alike, so noise of three tenths is added.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = op.as_list()
    for factor in factors:
        O, I = factor.out_features, factor.in_features
        start = torch.eye(O, I, dtype=torch.float64) if O == I else torch.zeros(O, I, dtype=torch.float64)
        fitted = type(factor).from_dense(start, **_sizes_of(factor))
        for own, near in zip(factor.parameters(), fitted.parameters(), strict=True):
            noise = torch.randn(own.shape, generator=generator, dtype=torch.float64) / own.shape[-1] ** 0.5
            own.copy_(near.to(own) + (0.3 if O == I else 1.0) * noise.to(own))
    size, wanted = torch.linalg.vector_norm(op.to_dense()), torch.linalg.vector_norm(weight)
    if size > 0:
        for own in op.parameters():
            own.mul_((wanted / size) ** (1 / len(factors)))


def _sizes_of(factor: StructuredLinear) -> dict[str, Any]:
    return {key: value for key, value in factor.sizes.items() if key not in ("in_features", "out_features")}
