"""The matrices of all experts from few bases that they share.

Shape letters: S rows, E experts, O out_features, I in_features, B bases, T rank; for one expert the factor of its own
(L, T) and the mixed basis (T, M): L and M are O and I, or I and O where it is mirrored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.cost import Cost
from tensormix.operators.experts import StackedLinear
from tensormix.operators.groups import Groups

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda z: z, "silu": F.silu, "tanh": torch.tanh}


class BasisExperts(StackedLinear):
    """W_e = own_e f(sum over b of mixing[e, b] bases[b]), or its transpose if `mirrored`; f is the activation.

    own (E, L T) is the factor of each expert, bases (B, T M) are shared. Only the basis of the experts that are called
    is mixed, once in each call for all its tokens, or for each of few tokens; in a compiled or exported graph that of
    every expert. Never is an expert made dense.

    Raises:
        ValueError: a size is not possible.
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, *,
        num_bases: int, rank: int, activation: str = "linear", mirrored: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(num_experts, in_features, out_features)
        if activation not in ACTIVATIONS:
            raise ValueError(f"BasisExperts: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        for value, limit, name in (
            (num_bases, num_experts, "num_bases"),
            (rank, min(in_features, out_features), "rank"),
        ):
            if not 1 <= value <= limit:
                raise ValueError(f"BasisExperts: {name} must be in 1..{limit}, got {value}")
        self.num_bases, self.rank, self.activation, self.mirrored = num_bases, rank, activation, mirrored
        L, M = (in_features, out_features) if mirrored else (out_features, in_features)
        self.own = nn.Parameter(torch.empty(num_experts, L * rank))
        self.bases = nn.Parameter(torch.empty(num_bases, rank * M))
        self.mixing = nn.Parameter(torch.empty(num_experts, num_bases))

    def basis(self, expert: int) -> Tensor:  # (T, M)
        """What the expert shares with others."""
        mixed = (self.mixing[expert][:, None] * self.bases).sum(0).view(self.rank, -1)
        return ACTIVATIONS[self.activation](mixed)

    def multiply(self, x: Tensor, expert: int) -> Tensor:  # (..., I) -> (..., O)
        own, basis = self.own[expert].view(-1, self.rank), self.basis(expert)
        return F.linear(F.linear(x, own.T), basis.T) if self.mirrored else F.linear(F.linear(x, basis), own)

    def multiply_groups(self, x: Tensor, groups: Groups) -> Tensor:  # (S, I) -> (S, O)
        own = self.own.view(self.num_experts, -1, self.rank)
        mixed = ACTIVATIONS[self.activation](
            groups.mix(self.mixing, self.bases).view(-1, self.rank, self._shared_width)
        )
        if self.mirrored:
            return groups.multiply_mixed(groups.multiply(x, own), mixed)
        return groups.multiply(groups.multiply_mixed(x, mixed.transpose(1, 2)), own.transpose(1, 2))

    def gains_from_groups(self, x: Tensor, num_rows: int) -> bool:
        """For few rows only: more would have the bases of all experts mixed at once, as large as dense experts."""
        return num_rows <= self.num_experts

    @property
    def _shared_width(self) -> int:  # M
        return self.out_features if self.mirrored else self.in_features

    def expert_dense(self, expert: int) -> Tensor:  # (O, I)
        own, bases = self.own[expert].view(-1, self.rank), self.bases.view(self.num_bases, self.rank, -1)
        mixed = ACTIVATIONS[self.activation](torch.einsum("b,btm->tm", self.mixing[expert], bases))
        dense = torch.einsum("lt,tm->lm", own, mixed)
        return dense.T if self.mirrored else dense

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features, "num_bases": self.num_bases}
        more = {"rank": self.rank, "activation": self.activation, "mirrored": self.mirrored}
        return {"num_experts": self.num_experts, **ends, **more}

    @property
    def macs_per_token(self) -> int:
        return (self.in_features + self.out_features) * self.rank

    @property
    def cost(self) -> Cost:
        """All bases are read for each expert, and of the factors its own."""
        whole, own = super().cost, self.own.numel() + self.mixing.numel()
        read = whole.parameters - own + own // self.num_experts
        return whole._replace(bytes_per_token=whole.bits // 8 * read // whole.parameters)
