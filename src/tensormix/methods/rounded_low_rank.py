"""Small integers plus a low rank that holds what they lose.

Shape letters: O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor

from tensormix.fitting.low_rank_step import low_rank_step
from tensormix.fitting.rounding_steps import round_factors
from tensormix.fitting.whitening import gram_factor, low_rank
from tensormix.methods.rounded_sum import Pair, Problem, RoundedSum
from tensormix.operators import LowRank, Quantized, StructuredLinear


class RoundedLowRank(RoundedSum):
    """The Q on a grid of integers and the L R of this rank with small tr((W - Q - L R) G (W - Q - L R)^T).

    G is the damped Gram matrix of the inputs. In turn: L R by the truncated SVD of (W - Q) G^(1/2), its factors rounded
    (the right one by the inputs, the left one fitted anew to that), and Q by `gptq` from W - L R, which so sees what
    rounding the factors lost. `start` says which comes first: Q of the whole weight (LQER), or the low rank of the
    whole weight, which is better where that holds most of it (CALDERA begins with Q = 0 too).
    """

    source = "arXiv 2402.02446 and 2405.18886"
    summary = "Small integers plus two thin factors, rounded too, that hold what the integers lose of the outputs."

    size = "rank"

    name: Literal["rounded_low_rank"] = "rounded_low_rank"
    rank: int = Field(ge=0)  # of the correction; 0 is gptq
    start: Literal["integers", "low_rank"] = "integers"

    def correction(self, in_features: int, out_features: int) -> LowRank | None:
        return None if self.rank == 0 else LowRank(in_features, out_features, rank=self.rank)

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[int, ...]:
        """Nothing, every rank up to 8, and from there on an eighth more each time, as long as factors pay."""
        ranks, most = [0], in_features * out_features // (in_features + out_features)
        while (rank := ranks[-1] + max(1, ranks[-1] // 8)) <= most:
            ranks.append(rank)
        return tuple(ranks)

    def pairs(self, problem: Problem, rounded: Quantized) -> Iterator[Pair]:
        root, _ = gram_factor(problem.gram)
        if self.start == "low_rank":
            whole = self._factors(problem, problem.weight, root)
            rounded = self.rounded_again(problem, problem.weight - whole.to_dense().detach().double())
        while True:
            factors = self._factors(problem, problem.weight - rounded.to_dense().double(), root)
            yield rounded, factors
            rounded = self.rounded_again(problem, problem.weight - factors.to_dense().detach().double())

    def _factors(self, problem: Problem, target: Tensor, root: Tensor) -> StructuredLinear:  # (O, I), (I, I)
        # Columns of one length on the left, so that a row of them is rounded on one scale.
        left, right = low_rank_step(target, root, self.rank)
        stored = self.rounded_beside(low_rank(problem.like, left, right))
        if isinstance(stored, Quantized) and problem.is_corrected:
            round_factors(stored, target, left, right, problem.gram, problem.columns, 0.0)
        return stored
