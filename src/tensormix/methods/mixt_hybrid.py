"""A tensor mixture beside a term of another kind: thin factors or a sparse weight, fitted in turn to the outputs.

Shape letters: I in_features, O out_features, N num_branches, Q, P output / input size of a core, R rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.alps_step import ScaledGram, alps
from tensormix.fitting.low_rank_step import low_rank_step
from tensormix.fitting.mixt_aware import descend, set_cores
from tensormix.fitting.mixt_normal import MixtNormal
from tensormix.fitting.output_error import damped
from tensormix.fitting.whitening import check_inputs, gram_root, low_rank
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import LowRank, MixT, Sparse, StructuredLinear, Sum
from tensormix.operators.base import computing_dtype
from tensormix.statistics import Gram

CORE_STEPS = 10  # of conjugate gradients in every round: they go on where those of the round before ended
PATIENCE = 3  # rounds in a row that may gain less than `tolerance`

OtherStep = Callable[[Tensor], tuple[Tensor, Any]]  # what the mixture leaves (O, I) -> the other term (O, I), its parts


@dataclass(frozen=True)
class Round:
    """One pair of terms, and the squared output error of their sum."""

    parts: Tensor  # (N, Q, P)
    other: Any
    error: float


def alternate(
    normal: MixtNormal, weight: Tensor, other_step: OtherStep, *, rounds: int, tolerance: float
) -> tuple[Round, list[float]]:  # (O, I)
    """The best of at most `rounds` pairs, and the error of every pair in the order in which they came.

    The other term goes first, from a mixture of zero: the few massive directions and entries of the weight are its own.
    The mixture then follows what that leaves by conjugate gradients, from where it was.
    """
    op = normal.op
    parts = weight.new_zeros(op.num_branches, op.core_out, op.core_in)
    errors: list[float] = []
    best: Round | None = None
    for _ in range(rounds):
        mixture = normal.image(parts)[: op.out_features, : op.in_features]
        dense, other = other_step(weight - mixture)
        parts, found, error = descend(normal, weight - dense, parts, tolerance=tolerance, max_steps=CORE_STEPS)
        errors.append(max(error - found.decrease, 0.0))
        if best is None or errors[-1] < best.error:
            best = Round(parts, other, errors[-1])
        if len(errors) > PATIENCE and min(errors) >= (1 - tolerance) * min(errors[:-PATIENCE]):
            break
    assert best is not None
    return best, errors


class Hybrid(LinearMethod):
    """What the two methods have in common; `keep` counts the numbers of both terms."""

    needs = (Gram,)
    size = "keep"

    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters to keep, both terms together
    num_branches: int = Field(ge=1)  # of the mixture: the more, the more of `keep` goes to the other term
    bond: int = Field(default=2, ge=2)
    rounds: int = Field(default=30, ge=1)  # at most
    tolerance: float = Field(default=1e-3, ge=0, allow_inf_nan=False)  # ends when 3 rounds gain less of the error

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        """One for every size of the other term, beside the mixture; none where the layer has no such mixture."""
        try:
            with torch.device("meta"):
                mixture = self._mixture(in_features, out_features).num_params
        except ValueError:  # more branches than the widths have bonds for
            return ()
        dense, step = in_features * out_features, self._stride(in_features, out_features)
        return tuple(ceil(count / dense * 1e6) / 1e6 for count in range(mixture + step, dense + 1, step))

    def fit(self, weight: Tensor, stats: Statistics) -> Sum:  # (O, I)
        """Raises ValueError if the layer does not allow the budget, or the inputs were all zero or not finite."""
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[Sum, dict[str, Any]]:  # (O, I)
        O, I = weight.shape
        gram = stats[Gram].mean.to(weight.device)
        check_inputs(gram)
        wide = weight.detach().to(computing_dtype(weight))
        mixture, room = self._mixture(I, O).to(wide), self.room(I, O)
        normal = MixtNormal(mixture, gram.to(wide))
        step = self._step(gram, wide, room)
        best, errors = alternate(normal, wide, step, rounds=self.rounds, tolerance=self.tolerance)
        set_cores(mixture, best.parts)
        whole = float((wide @ gram.to(wide) * wide).sum())
        facts = {
            "fit_steps": len(errors),
            "fit_precision": str(wide.dtype).removeprefix("torch."),
            "output_error": (best.error / whole) ** 0.5 if whole > 0 else None,
        }
        return Sum(terms=[mixture.to(weight), self._other(weight, best.other)]).to(weight), facts

    def room(self, in_features: int, out_features: int) -> int:
        """How many numbers of the budget the mixture leaves to the other term.

        Raises:
            ValueError: it leaves too few.
        """
        with torch.device("meta"):
            mixture = self._mixture(in_features, out_features).num_params
        dense, least = in_features * out_features, self._least(in_features, out_features)
        room = floor(self.keep * dense + 1e-9) - mixture  # the margin undoes the rounding of keep
        if room < least:
            raise ValueError(
                f"{type(self).__name__}: a mixture of {self.num_branches} branches stores {mixture} of the {dense} "
                f"numbers of a {in_features}x{out_features} layer and the other term at least {least}, but "
                f"keep={self.keep} leaves {max(room, 0)} for it; keep more, or take more branches."
            )
        return room

    def _mixture(self, in_features: int, out_features: int) -> MixT:
        return MixT(in_features, out_features, num_branches=self.num_branches, bond=self.bond)

    @abstractmethod
    def _least(self, in_features: int, out_features: int) -> int:
        """The fewest numbers of the other term."""

    def _stride(self, in_features: int, out_features: int) -> int:
        """How many numbers lie between two sizes of the other term."""
        return self._least(in_features, out_features)

    @abstractmethod
    def _step(self, gram: Tensor, weight: Tensor, room: int) -> OtherStep:  # (I, I), (O, I)
        """The best other term of `room` numbers for what the mixture leaves."""

    @abstractmethod
    def _other(self, weight: Tensor, parts: Any) -> StructuredLinear:  # (O, I)
        """The operator with these parts, in the dtype of `weight`."""


class MixtLowRank(Hybrid):
    """MixT plus a low rank: the optimal low rank of what the mixture leaves, the mixture of what that leaves, in turn.

    Every round is a closed form and conjugate gradients, and the error never rises. `split_search` compares what
    different `num_branches` leave at one `keep`.
    """

    source = "ours"
    summary = "MixT plus two thin factors, fitted in turn to the outputs."

    name: Literal["mixt_low_rank"] = "mixt_low_rank"

    def empty(self, in_features: int, out_features: int) -> Sum:
        with torch.device("meta"):
            factors = LowRank(in_features, out_features, rank=self._rank(in_features, out_features))
            return Sum(terms=[self._mixture(in_features, out_features), factors])

    def _rank(self, in_features: int, out_features: int) -> int:
        rank = self.room(in_features, out_features) // (in_features + out_features)
        return min(rank, in_features, out_features)

    def _least(self, in_features: int, out_features: int) -> int:
        return in_features + out_features

    def _step(self, gram: Tensor, weight: Tensor, room: int) -> OtherStep:
        rank, root = self._rank(weight.shape[1], weight.shape[0]), gram_root(gram).to(weight)

        def step(target: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            left, right = low_rank_step(target, root, rank)
            return left @ right, (left, right)

        return step

    def _other(self, weight: Tensor, parts: tuple[Tensor, Tensor]) -> LowRank:
        left, right = parts
        scale = right.norm(dim=1).sqrt()
        scale = torch.where(scale > 0, scale, 1)  # each column as long as its row
        return low_rank(weight, left * scale, right / scale[:, None])


class MixtSparse(Hybrid):
    """MixT plus a few entries of the weight, chosen by ALPS for what the mixture leaves, in turn.

    The positions of the entries come on top of `keep`: see `Sparse`. The choice of entries is greedy, so the error may
    rise; the pair with the smallest is kept.
    """

    source = "ours; the entries by arXiv 2406.07831"
    summary = "MixT plus a sparse weight, fitted in turn to the outputs."

    name: Literal["mixt_sparse"] = "mixt_sparse"

    def empty(self, in_features: int, out_features: int) -> Sum:
        with torch.device("meta"):
            entries = Sparse(in_features, out_features, num_values=self.room(in_features, out_features))
            return Sum(terms=[self._mixture(in_features, out_features), entries])

    def _least(self, in_features: int, out_features: int) -> int:
        return 1

    def _stride(self, in_features: int, out_features: int) -> int:
        return max(1, in_features * out_features // 64)

    def _step(self, gram: Tensor, weight: Tensor, room: int) -> OtherStep:
        scaled = ScaledGram.of(damped(gram, 0.005, 0.01), weight.dtype)  # as `hassle_free` damps

        def step(target: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            entries = alps(target, scaled, num_values=room, max_steps=30)
            return entries[0], entries

        return step

    def _other(self, weight: Tensor, parts: tuple[Tensor, Tensor]) -> Sparse:
        values, mask = parts
        return Sparse.from_mask(values.to(weight.dtype), mask)


def split_search(method: MixtLowRank | MixtSparse, weight: Tensor, stats: Statistics) -> dict[int, float | None]:
    """The output error of `method` with every `num_branches` that the layer and `keep` allow, weight (O, I).

    More branches give more of the budget to the other term, so this is how the data choose the split.
    """
    errors: dict[int, float | None] = {}
    for num_branches in range(1, 32):
        candidate = method.model_copy(update={"num_branches": num_branches})
        try:
            candidate.empty(weight.shape[1], weight.shape[0])
        except ValueError:  # too large a mixture for the budget, or too many branches for the layer
            continue
        errors[num_branches] = candidate.fit_with_facts(weight, stats)[1]["output_error"]
    return errors
