"""Two thin factors for each expert, those of all experts in one tensor.

Shape letters: S rows, E experts, O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear
from tensormix.operators.experts import ExpertStack, StackedLinear, biases_of
from tensormix.operators.groups import Groups
from tensormix.operators.low_rank import LowRank


class LowRankStack(StackedLinear):
    """W_e = left[e].T @ right[e], of rank at most R: left is (E, R, O) and right (E, R, I).

    In both the last axis is a width of the model, so that a grouped product finds rows of whole 16 bytes at any rank.

    Raises:
        ValueError: `rank` is outside 1..min(I, O).
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, rank: int) -> None:
        super().__init__(num_experts, in_features, out_features)
        limit = min(in_features, out_features)
        if not 1 <= rank <= limit:
            raise ValueError(f"LowRankStack: rank must be in 1..{limit}, got {rank}")
        self.rank = rank
        self.left = nn.Parameter(torch.empty(num_experts, rank, out_features))
        self.right = nn.Parameter(torch.empty(num_experts, rank, in_features))

    @classmethod
    def from_experts(cls, experts: Sequence[LowRank]) -> LowRankStack:
        """The stack of operators of one shape and rank. Their biases become the rows of its bias."""
        first = experts[0]
        with torch.device("meta"):
            stack = cls(len(experts), first.in_features, first.out_features, rank=first.rank)
        stack.left = nn.Parameter(torch.stack([expert.left.detach().t() for expert in experts]))
        stack.right = nn.Parameter(torch.stack([expert.right.detach() for expert in experts]))
        stack.bias = biases_of(experts)
        return stack

    def one_by_one(self) -> ExpertStack:
        """The same experts, each an operator of its own with a copy of its factors."""
        with torch.device(self.left.device):
            experts = [LowRank(self.in_features, self.out_features, rank=self.rank) for _ in range(self.num_experts)]
        for number, expert in enumerate(experts):
            expert.left = nn.Parameter(self.left[number].detach().t().contiguous())
            expert.right = nn.Parameter(self.right[number].detach().clone())
        stack = ExpertStack(each=experts, num_experts=self.num_experts)
        stack.bias = self.bias
        return stack.train(self.training)

    def multiply(self, x: Tensor, expert: int) -> Tensor:  # (..., I) -> (..., O)
        return F.linear(F.linear(x, self.right[expert]), self.left[expert].t())

    def multiply_groups(self, x: Tensor, groups: Groups) -> Tensor:  # (S, I) -> (S, O)
        return groups.multiply(groups.multiply(x, self.right.transpose(1, 2)), self.left)

    def expert_dense(self, expert: int) -> Tensor:  # (O, I)
        return torch.einsum("ro,ri->oi", self.left[expert], self.right[expert])

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {"num_experts": self.num_experts, **ends, "rank": self.rank}

    @property
    def macs_per_token(self) -> int:
        return self.rank * (self.in_features + self.out_features)


def stack_of(experts: Sequence[StructuredLinear]) -> ExpertStack | LowRankStack:
    """The stack of these operators: one tensor for each factor if all are `LowRank` of one rank, else one by one.

    Raises:
        ValueError: there are none, or they differ in shape.
    """
    same = [expert for expert in experts if type(expert) is LowRank and expert.spec == experts[0].spec]
    return LowRankStack.from_experts(same) if same and len(same) == len(experts) else ExpertStack.from_experts(experts)
