"""The matrices of all experts as one Tucker tensor.

Shape letters: E experts, O out_features, I in_features, and their ranks: A experts, R outputs, S inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.cost import Cost
from tensormix.operators.experts import StackedLinear
from tensormix.operators.groups import Groups


class TuckerStack(StackedLinear):
    """W_e = left (sum over a of mixing[e, a] core[a]) right, with left (O, R), core (A, R S) and right (S, I).

    With as many cores as experts every expert has its own, and nothing is mixed. Otherwise the core of an expert is
    mixed once in each call, for all its tokens. Calls with the rows of all experts mix the core of every expert, or one
    for each of few rows. Never is an expert made dense.

    Args:
        ranks: (A, R, S).

    Raises:
        ValueError: a rank is not possible.
    """

    mixing: nn.Parameter | None  # (E, A)

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, ranks: Sequence[int]) -> None:
        super().__init__(num_experts, in_features, out_features)
        A, R, S = self.ranks = checked_ranks(ranks, num_experts, out_features, in_features)
        self.left = nn.Parameter(torch.empty(out_features, R))
        self.right = nn.Parameter(torch.empty(S, in_features))
        self.core = nn.Parameter(torch.empty(A, R * S))
        self.register_parameter("mixing", nn.Parameter(torch.empty(num_experts, A)) if A < num_experts else None)

    def _core(self, expert: int) -> Tensor:  # (R, S)
        _, R, S = self.ranks
        if self.mixing is None:
            return self.core[expert].view(R, S)
        return (self.mixing[expert][:, None] * self.core).sum(0).view(R, S)

    def multiply(self, x: Tensor, expert: int) -> Tensor:  # (..., I) -> (..., O)
        return F.linear(F.linear(F.linear(x, self.right), self._core(expert)), self.left)

    def multiply_groups(self, x: Tensor, groups: Groups) -> Tensor:  # (N, I) -> (N, O)
        _, R, S = self.ranks
        z = F.linear(x, self.right)
        if self.mixing is None:
            z = groups.multiply(z, self.core.view(-1, R, S).transpose(1, 2))
        else:
            z = groups.multiply_mixed(z, groups.mix(self.mixing, self.core).view(-1, R, S).transpose(1, 2))
        return F.linear(z, self.left)

    def gains_from_groups(self, x: Tensor, num_rows: int) -> bool:
        """Always: the factors around the cores are multiplied once for all experts."""
        return True

    def expert_dense(self, expert: int) -> Tensor:  # (O, I)
        A, R, S = self.ranks
        weights = torch.eye(A)[expert].to(self.core) if self.mixing is None else self.mixing[expert]
        return torch.einsum("or,a,ars,si->oi", self.left, weights, self.core.view(A, R, S), self.right)

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {"num_experts": self.num_experts, **ends, "ranks": list(self.ranks)}

    @property
    def macs_per_token(self) -> int:
        _, R, S = self.ranks
        return self.in_features * S + S * R + R * self.out_features

    @property
    def cost(self) -> Cost:
        """What all experts share is read for each of them, and of the cores its own, or all that are mixed."""
        whole, own = super().cost, self.core.numel()
        read = whole.parameters - (own - own // self.num_experts if self.mixing is None else 0)
        return whole._replace(bytes_per_token=whole.bits // 8 * read // whole.parameters)


def num_params(num_experts: int, out_features: int, in_features: int, ranks: Sequence[int]) -> int:
    """What a `TuckerStack` of these sizes stores: A R S + O R + I S, and E A unless A = E."""
    A, R, S = ranks
    return A * R * S + out_features * R + in_features * S + (num_experts * A if num_experts > A else 0)


def checked_ranks(ranks: Sequence[int], *largest: int) -> tuple[int, int, int]:
    """Raise ValueError if one is not possible."""
    names = "the experts", "the outputs", "the inputs"
    for rank, limit, name in zip(ranks, largest, names, strict=True):
        if not 1 <= rank <= limit:
            raise ValueError(f"TuckerStack: the rank of {name} must be in 1..{limit}, got {rank}")
    return ranks[0], ranks[1], ranks[2]
