"""The experts of a stack in one Tucker tensor.

Shape letters: E experts, O out_features, I in_features, K directions of the inputs; the ranks A, R, S of E, O, I.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.hooi import Tucker, full_hosvd, held_by, hooi
from tensormix.fitting.whitening import gram_root
from tensormix.methods.base import StackMethod, Statistics
from tensormix.operators import TuckerStack
from tensormix.operators.tucker_stack import checked_ranks, num_params
from tensormix.statistics import Gram

Ranks = tuple[int, int, int]
_STEP = 8  # of the ranks of outputs and inputs, by the published rule


class TdMoe(StackMethod):
    """All experts of a stack as one tensor (experts, outputs, inputs), in Tucker form.

    It minimises sum_e p_e ||(W_e - W'_e) S||^2, where S S^T is the Gram matrix of the inputs of all experts and p_e the
    share of the tokens that expert e gets, by HOOI. With `experts: preserve` every expert has a core of its own; with
    `compress` the cores are combinations of fewer. Gate and up of fused experts are one stack and share their factors.

    With `keep` the ranks are those that hold most of the tensor within the budget, of all that the cut HOSVD offers.

    What the released code does is `whiten: false`, `routing: false`, `steps: 0` and `rank_rule: published`: ranks whose
    count is nearest to the budget, whatever they hold.

    Raises ValueError unless exactly one of `keep` and `ranks` is given.
    """

    source = "TD-MoE, as in arXiv 2606.03465; whitening by C^(1/2), routing shares and ranks by energy are ours"
    summary = "The experts of a stack share Tucker factors, and each has a core of its own or a mixture of few."
    needs = (Gram,)
    size = "keep"

    name: Literal["td_moe"] = "td_moe"
    keep: float | None = Field(default=None, gt=0, lt=1)  # fraction of the dense numbers of the stack
    ranks: Ranks | None = Field(default=None, strict=False)  # of experts, outputs, inputs
    experts: Literal["preserve", "compress"] = "preserve"
    whiten: bool = True
    routing: bool = True  # weigh the experts by the tokens they get
    rank_rule: Literal["energy", "published"] = "energy"
    steps: int = Field(default=20, ge=0)  # of HOOI, at most
    tolerance: float = Field(default=1e-6, ge=0, allow_inf_nan=False)  # stops where a step gains less of the energy

    @model_validator(mode="after")
    def _one_of_both(self) -> TdMoe:
        if (self.keep is None) == (self.ranks is None):
            raise ValueError("td_moe needs either keep (a fraction) or ranks (of experts, outputs, inputs)")
        return self

    def empty(self, num_experts: int, in_features: int, out_features: int) -> TuckerStack:
        """With `keep` the ranks depend on the weights: these are those of a tensor whose energy lies evenly."""
        sizes = num_experts, out_features, in_features
        numbers = self._numbers_of_cores(num_experts)
        even = torch.ones(in_features, out_features, device="cpu").cumsum(0).cumsum(1)
        with torch.device("meta"):
            ranks = self._ranks(sizes, ((A, even * A) for A in numbers))
            return TuckerStack(num_experts, in_features, out_features, ranks=ranks)

    def fit(self, weight: Tensor, stats: Sequence[Statistics]) -> TuckerStack:  # (E, O, I)
        E, O, I = weight.shape
        root = self._root(stats, weight)
        scale = self._scale(stats, weight)
        tensor = torch.einsum("eoi,ik,e->koe", weight.double(), root, scale)
        whole = full_hosvd([tensor[:, None]])
        ranks = self._ranks((E, O, I), ((A, held_by(whole, A)) for A in self._numbers_of_cores(E)), len(whole.hidden))
        A, R, S = ranks
        found = hooi(whole, (min(S, len(whole.hidden)), R, A), self.steps, self.tolerance)
        op = TuckerStack(E, I, O, ranks=ranks).to(weight)
        fill(op, found, torch.linalg.pinv(root), scale)
        return op

    def _root(self, stats: Sequence[Statistics], weight: Tensor) -> Tensor:  # (I, K)
        if not self.whiten:
            return torch.eye(weight.shape[2], dtype=torch.float64, device=weight.device)
        pooled = torch.stack([of_expert[Gram].sum.double() for of_expert in stats]).sum(0)
        tokens = sum(of_expert[Gram].num_tokens for of_expert in stats)
        return gram_root(pooled / tokens).to(weight.device)

    def _scale(self, stats: Sequence[Statistics], weight: Tensor) -> Tensor:  # (E,)
        """Square roots of the shares; an expert that got no token counts as if it had got one."""
        tokens = [max(1, of_expert[Gram].num_tokens) if self.routing else 1 for of_expert in stats]
        counts = torch.tensor(tokens, dtype=torch.float64, device=weight.device)
        return (counts / counts.sum()).sqrt()

    def _numbers_of_cores(self, E: int) -> range:
        return range(E, E + 1) if self.experts == "preserve" else range(1, E + 1)

    def _ranks(self, sizes: tuple[int, int, int], tables: Iterable[tuple[int, Tensor]], reach: int = 0) -> Ranks:
        """The ranks (A, R, S). A table (S, R) has what is held at the ranks of inputs and outputs; the inputs reach
        `reach` directions, all of them if that is 0."""
        E, O, I = sizes
        dense = E * O * I
        if self.ranks is not None:
            checked_ranks(self.ranks, E, O, I)
            if num_params(E, O, I, self.ranks) > dense:
                raise ValueError(self._expands(sizes, self.ranks))
            return self.ranks
        assert self.keep is not None
        if self.rank_rule == "published":
            return self._published(sizes, round(self.keep * dense))
        best, most, room = None, -1.0, int(self.keep * dense + 1e-6)
        for A, table in tables:
            R = torch.arange(1, O + 1, device=table.device)
            mixing = E * A if A < E else 0
            S = ((room - mixing - O * R) / (A * R + I)).floor().long().clamp(max=reach or I)
            held = table[(S - 1).clamp(min=0), R - 1].where(S >= 1, -1.0)
            at = int(held.argmax())
            if float(held[at]) > most and int(S[at]) >= 1:
                best, most = (A, int(R[at]), int(S[at])), float(held[at])
        if best is None:
            least = min(num_params(E, O, I, (A, 1, 1)) for A in self._numbers_of_cores(E))
            smallest = ceil(least / dense * 1e6) / 1e6
            raise ValueError(f"td_moe: keep={self.keep} leaves no rank; the smallest usable keep is {smallest}")
        return best

    def _published(self, sizes: tuple[int, int, int], room: int) -> Ranks:
        """The first of those whose count is nearest to `room`, in multiples of 8; where A = E mixing counts too."""
        E, O, I = sizes
        steps = torch.arange(_STEP, I + 1, _STEP, device="cpu")
        found: Iterator[tuple[int, Ranks]] = (
            (int(distance[at]), (A, R, int(steps[at])))
            for A in self._numbers_of_cores(E)
            for R in range(_STEP, O + 1, _STEP)
            for mixing in [E * A if self.experts == "compress" else 0]
            for distance in [((A * R + I) * steps + O * R + mixing - room).abs()]
            for at in [int(distance.argmin())]
        )
        best = min(found, key=lambda item: item[0], default=None)
        if best is None:
            raise ValueError(f"td_moe: rank_rule: published needs {_STEP} outputs and inputs, got {O} and {I}")
        return best[1]

    def _expands(self, sizes: tuple[int, int, int], ranks: Ranks) -> str:
        (E, O, I), (A, R, _) = sizes, ranks
        dense = E * O * I
        largest = (dense - num_params(E, O, I, (A, R, 0))) // (A * R + I)
        nearest = f"the largest rank of the inputs at the same others is {largest}" if largest > 0 else "take smaller"
        count = num_params(E, O, I, ranks)
        return f"td_moe: ranks={list(ranks)} would hold {count:,} numbers, more than the {dense:,} there; {nearest}"


@torch.no_grad()
def fill(op: TuckerStack, found: Tucker, back: Tensor, scale: Tensor) -> None:  # (K, I), (E,)
    """Give the operator these factors, with the weights of inputs and experts undone."""
    A, _, S = op.ranks
    (core,), (experts,) = found.cores, found.parts
    core = core[:, 0].permute(2, 1, 0)  # (A, R, S)
    experts = experts / scale[:, None]
    right = torch.zeros(S, op.in_features).to(back)
    right[: found.hidden.shape[1]] = found.hidden.T @ back
    core = torch.nn.functional.pad(core, (0, S - core.shape[2]))
    op.left.copy_(found.channels)
    op.right.copy_(right)
    if op.mixing is None:
        op.core.copy_((experts @ core.flatten(1)).view(A, -1))
    else:
        op.core.copy_(core.flatten(1))
        op.mixing.copy_(experts)
