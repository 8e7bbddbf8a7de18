"""Experts that share bases.

Shape letters: E experts, O out_features, I in_features, B bases, T rank, L and M as in `BasisExperts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.shared_bases import SharedBases, grouped, improved
from tensormix.methods.base import StackMethod, Statistics
from tensormix.operators import BasisExperts
from tensormix.operators.basis_experts import ACTIVATIONS

_SMALL = 1e-2  # pre-activations of the start, beside 1: there silu(z) = z / 2 and tanh(z) = z up to a percent


class Mobe(StackMethod):
    """W_e = A_e f(sum over b of c[e, b] B_b): every expert has a factor of its own and mixes its basis from few.

    Without an activation f the three are found by alternating least squares, from the best groups of experts that share
    one basis each. With `silu` or `tanh` that solution is the start (at small pre-activations both are linear), and
    Adam goes on from there; the best state is kept, so that it is never worse than the start.

    `keep` decides the rank T. Without `mirrored` the bases lie on the side of the larger of O and I, where they cost
    least; the published form has them at the inputs.
    """

    source = "MoBE, arXiv 2508.05257; rank from the budget, least squares, the start and the mirrored form are ours"
    summary = "Every expert has a factor of its own and mixes its basis from few that all share."
    size = "keep"

    name: Literal["mobe"] = "mobe"
    keep: float | None = Field(default=None, gt=0, lt=1)  # fraction of the dense numbers of the stack
    rank: int | None = Field(default=None, ge=1)  # T, instead of `keep`
    num_bases: int = Field(default=4, ge=1)
    activation: Literal["linear", "silu", "tanh"] = "linear"
    mirrored: bool | None = None  # whether the bases are at the outputs; None takes the larger side
    steps: int = Field(default=30, ge=0)  # of least squares, at most
    adam_steps: int = Field(default=200, ge=0)  # with an activation
    learning_rate: float = Field(default=1e-2, gt=0, allow_inf_nan=False)  # of Adam, for weights of unit variance
    tolerance: float = Field(default=1e-5, ge=0, allow_inf_nan=False)  # stops where a step gains less of the energy

    @model_validator(mode="after")
    def _one_of_both(self) -> Mobe:
        if (self.keep is None) == (self.rank is None):
            raise ValueError("mobe needs either keep (a fraction) or rank (of the bases)")
        return self

    def empty(self, num_experts: int, in_features: int, out_features: int) -> BasisExperts:
        sizes = num_experts, out_features, in_features
        mirrored = out_features > in_features if self.mirrored is None else self.mirrored
        with torch.device("meta"):
            return BasisExperts(
                num_experts, in_features, out_features, num_bases=min(self.num_bases, num_experts),
                rank=self._rank(sizes, mirrored), activation=self.activation, mirrored=mirrored,
            )  # fmt: skip

    def _rank(self, sizes: tuple[int, int, int], mirrored: bool) -> int:
        """T. Raises ValueError if none fits, or the one that is asked for would hold more than the dense experts."""
        E, O, I = sizes
        B, (L, M), dense = min(self.num_bases, E), (I, O) if mirrored else (O, I), E * O * I
        most = min(O, I)

        def largest(room: int) -> int:
            return min(most, (room - E * B) // (E * L + B * M))

        if self.rank is not None:
            count = self.rank * (E * L + B * M) + E * B
            if count > dense:
                raise ValueError(
                    f"mobe: rank={self.rank} with num_bases={B} would hold {count:,} numbers, more than the {dense:,} "
                    f"of the dense experts; the largest rank that does not is {max(0, largest(dense))}"
                )
            return self.rank
        assert self.keep is not None
        rank = largest(int(self.keep * dense + 1e-6))
        if rank < 1:
            least = ceil((E * L + B * M + E * B) / dense * 1e6) / 1e6
            raise ValueError(
                f"mobe: keep={self.keep} leaves no rank with num_bases={B}; the smallest usable keep is {least}"
            )
        return rank

    def fit(self, weight: Tensor, stats: Sequence[Statistics]) -> BasisExperts:  # (E, O, I)
        E, O, I = weight.shape
        empty = self.empty(E, I, O)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scale = float(wide.std()) or 1.0
        wide = (wide.mT if empty.mirrored else wide) / scale  # (E, L, M)
        found = improved(grouped(wide, empty.num_bases, empty.rank, rounds=10), wide, self.steps, self.tolerance)
        if self.activation != "linear":
            found = self._bent(found, wide)
        op = BasisExperts(**empty.sizes).to(weight)
        with torch.no_grad():
            op.own.copy_((scale * found.own).flatten(1))
            op.bases.copy_(found.bases.flatten(1))
            op.mixing.copy_(found.mixing)
        return op

    def _bent(self, found: SharedBases, wide: Tensor) -> SharedBases:  # (E, L, M)
        """The same with the activation, by Adam on all three from where it does next to nothing."""
        act, slope = ACTIVATIONS[self.activation], 0.5 if self.activation == "silu" else 1.0
        shrink = _SMALL / float(found.mixed().abs().max())
        start = found.own / (slope * shrink), found.bases * shrink, found.mixing
        held = [part.detach().clone().requires_grad_() for part in start]
        # Each part moves by steps that are as large beside its own numbers.
        rates = [{"params": [p], "lr": self.learning_rate * float(p.detach().square().mean().sqrt())} for p in held]
        adam = torch.optim.Adam(rates)
        best, least = start, float("inf")
        with torch.enable_grad():
            for step in range(self.adam_steps + 1):
                own, bases, mixing = held
                error = (wide - own @ act(torch.einsum("eb,btm->etm", mixing, bases))).square().sum()
                if float(error.detach()) < least:
                    best, least = (
                        (own.detach().clone(), bases.detach().clone(), mixing.detach().clone()),
                        float(error.detach()),
                    )
                if step < self.adam_steps:
                    adam.zero_grad()
                    error.backward()
                    adam.step()
        return SharedBases(*best)
