"""A sparse weight plus one of low rank, fitted in turn to the calibration inputs.

Shape letters: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.alps_step import ScaledGram, alps
from tensormix.fitting.low_rank_step import low_rank_step
from tensormix.fitting.output_error import damped, output_error
from tensormix.fitting.sparsegpt_step import inverse_factor, sparsegpt
from tensormix.fitting.whitening import low_rank
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import LowRank, Sparse, StructuredLinear, Sum
from tensormix.operators.base import computing_dtype
from tensormix.operators.sparse import GROUPED, check_pattern, pattern_count
from tensormix.statistics import Gram

# With penalties of ALPS that grow, the error can rise for ten steps and then fall below what it was.
PATIENCE = 20
# Of ADMM, for one sparse step among many: the alternation ends no higher than with hundreds, and is there sooner.
ADMM_STEPS = 12
SparseStep = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (O, I), number of the step -> (O, I), mask (O, I)


class HassleFree(LinearMethod):
    """The S + L, sparse and of low rank, with small tr((W - S - L) G (W - S - L)^T), G the Gram matrix of the inputs.

    Alternates a sparse step on W - L with the optimal L for W - S, from L = 0, and keeps the S + L with the smallest
    error. The steps see G with `damping` and `relative_damping`, the error that is compared is that of G itself. The
    low-rank step is the closed form of 3BASiL where HASSLE-free takes 50 steps of Adam. The published `rho_growth` is
    5; it soon pins the support down, and the alternation then gains nothing. Of a weight without any structure, with
    correlated inputs, ALPS alone (rank 0) left a smaller error than both together: try both.

    What is kept: "unstructured" takes `keep` and either `low_rank_share` (kappa; the published value is 0.3) or `rank`;
    the values of S are what the factors leave of the budget, (1 - kappa) keep O I up to rounding. N:M takes `keep`,
    which must exceed N/M and goes to the factors beyond that, or `rank`. Rank 0 gives a Sparse alone. The positions of
    the values come on top: see `Sparse`.
    """

    source = "arXiv 2502.00899; the low-rank step as in arXiv 2603.01376"
    summary = "A sparse weight plus two thin factors, fitted in turn to the calibration inputs."
    needs = (Gram,)

    size = "keep"
    largest = 1.0

    name: Literal["hassle_free"] = "hassle_free"
    keep: float | None = Field(default=None, gt=0, le=1)  # fraction of the dense parameters to keep, S and L together
    low_rank_share: float | None = Field(default=None, ge=0, lt=1)  # fraction of those that goes to L, kappa
    rank: int | None = Field(default=None, ge=0)  # of L
    pattern: Literal["unstructured", "2:4", "2:8", "3:8", "4:8"] = "unstructured"
    sparse: Literal["alps", "sparsegpt"] = "alps"
    rho_growth: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # the rho of ALPS in step t is 0.1 (growth t + 1)
    steps: int = Field(default=80, ge=1)  # at most; it ends when 20 steps in a row gain less than a thousandth
    damping: float = Field(default=0.005, gt=0, allow_inf_nan=False)  # added to the diagonal of G, times its mean
    relative_damping: float = Field(default=0.01, ge=0, allow_inf_nan=False)  # added to the diagonal, times itself

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = {name for name in ("keep", "low_rank_share", "rank") if getattr(self, name) is not None}
        if self.pattern == "unstructured":
            allowed, words = [{"keep", "low_rank_share"}, {"keep", "rank"}], "keep with either low_rank_share or rank"
        else:
            allowed, words = [{"keep"}, {"rank"}], "either keep or rank"
        if given not in allowed:
            got = " and ".join(sorted(given)) or "none of them"
            raise ValueError(f"HassleFree: pattern {self.pattern!r} takes {words}, got {got}")
        return self

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        """Steps of 1/64 of the dense parameters; with N:M one for every rank beside the pattern."""
        fractions = [step / 64 for step in range(1, 65)]
        if self.pattern in GROUPED:
            dense, per_rank = in_features * out_features, in_features + out_features
            least = pattern_count(self.pattern, in_features, out_features)
            fractions = [ceil(n / dense * 1e6) / 1e6 for n in range(least, dense + 1, per_rank)]
        return tuple(keep for keep in fractions if self._allows(keep, in_features, out_features))

    def _allows(self, keep: float, in_features: int, out_features: int) -> bool:
        try:
            self.sized(keep).counts(in_features, out_features)
        except ValueError:
            return False
        return True

    def empty(self, in_features: int, out_features: int) -> StructuredLinear:
        num_values, rank = self.counts(in_features, out_features)
        with torch.device("meta"):
            sparse = Sparse(in_features, out_features, num_values=num_values, pattern=self.pattern)
            return Sum(terms=[sparse, LowRank(in_features, out_features, rank=rank)]) if rank else sparse

    def fit(self, weight: Tensor, stats: Statistics) -> StructuredLinear:  # (O, I)
        """Raises ValueError if the layer does not allow the budget, or the inputs were all zero or not finite."""
        num_values, rank = self.counts(weight.shape[1], weight.shape[0])
        wide = weight.detach().to(computing_dtype(weight))
        gram = stats[Gram].mean.to(weight.device)
        stable = damped(gram, self.damping, self.relative_damping)
        best, _ = alternate(
            wide,
            gram.to(wide),
            torch.linalg.cholesky(stable).to(wide),
            self._sparse_step(stable, wide.dtype, num_values, alone=rank == 0),
            rank=rank,
            steps=self.steps if rank else 1,
        )
        sparse = Sparse.from_mask(best.sparse.to(weight.dtype), best.mask, pattern=self.pattern)
        if rank == 0:
            return sparse
        scale = best.right.norm(dim=1).sqrt()
        scale = torch.where(scale > 0, scale, 1)  # each column as long as its row
        return Sum(terms=[sparse, low_rank(weight, best.left * scale, best.right / scale[:, None])]).to(weight)

    def counts(self, in_features: int, out_features: int) -> tuple[int, int]:
        """How many values S stores, and the rank of L.

        Raises:
            ValueError: the pattern does not divide the rows, or the budget cannot be met.
        """
        check_pattern(self.pattern, in_features, out_features)
        grouped = self.pattern in GROUPED
        dense, per_rank = in_features * out_features, in_features + out_features
        budget = dense if self.keep is None else floor(self.keep * dense + 1e-9)  # the margin undoes its rounding
        least = pattern_count(self.pattern, in_features, out_features) if grouped else 1
        layer = f"a {in_features}x{out_features} layer"
        if budget < least:
            raise ValueError(
                f"HassleFree: keep={self.keep} is {budget} of the {dense} numbers of {layer}, and pattern "
                f"{self.pattern} stores at least {least}; keep can be {ceil(least / dense * 1e6) / 1e6:g} to 1."
            )
        largest = (budget - least) // per_rank
        if self.rank is not None and self.rank > largest:
            raise ValueError(
                f"HassleFree: rank {self.rank} does not fit into {layer}: of {budget} numbers pattern {self.pattern} "
                f"takes at least {least} and every rank {per_rank}; rank can be 0 to {largest}."
            )
        if self.rank is not None:
            rank = self.rank
        elif self.low_rank_share is not None and self.keep is not None:
            rank = min(largest, floor(self.low_rank_share * self.keep * dense / per_rank + 1e-9))
        else:
            rank = largest
        return (least if grouped else budget - rank * per_rank), rank

    def _sparse_step(self, gram: Tensor, dtype: torch.dtype, num_values: int, alone: bool) -> SparseStep:
        """The chosen step; what depends on the inputs alone is computed here, once."""
        size = {"num_values": num_values, "pattern": self.pattern}
        if self.sparse == "sparsegpt":
            factor = inverse_factor(gram).to(dtype)
            return lambda target, step: sparsegpt(target, factor, **size)
        scaled = ScaledGram.of(gram, dtype)
        max_steps = 300 if alone else ADMM_STEPS

        def step_alps(target: Tensor, step: int) -> tuple[Tensor, Tensor]:
            return alps(target, scaled, rho=0.1 * (self.rho_growth * step + 1), max_steps=max_steps, **size)

        return step_alps


@dataclass(frozen=True)
class Iterate:
    """One pair of S and L."""

    sparse: Tensor  # (O, I)
    mask: Tensor  # (O, I) where S has stored entries
    left: Tensor  # (O, R)
    right: Tensor  # (R, I)


def alternate(
    weight: Tensor, gram: Tensor, root: Tensor, sparse_step: SparseStep, *, rank: int, steps: int
) -> tuple[Iterate, list[float]]:  # (O, I), (I, I), (I, I)
    """The best pair of at most `steps`, and the error of every pair in the order in which they came.

    Args:
        gram: what the error is measured with.
        root: root root^T is what the low-rank steps work with.
    """
    left, right = weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
    errors: list[float] = []
    best: Iterate | None = None
    for step in range(steps):
        sparse, mask = sparse_step(weight - left @ right, step)
        if rank:
            left, right = low_rank_step(weight - sparse, root, rank)
        errors.append(output_error(weight - sparse - left @ right, gram))
        if best is None or errors[-1] < min(errors[:-1]):
            best = Iterate(sparse, mask, left, right)
        if step >= PATIENCE and min(errors) > 0.999 * min(errors[:-PATIENCE]):
            break
    assert best is not None
    return best, errors
