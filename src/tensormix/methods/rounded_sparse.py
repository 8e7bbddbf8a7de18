"""Small integers plus the few entries that they would lose most on.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.rounding_steps import corrected_codes, packed_part, searched_grid
from tensormix.methods.rounded_sum import Pair, Problem, RoundedSum
from tensormix.operators import Dense, Quantized, Sparse
from tensormix.operators.sparse import largest


class RoundedSparse(RoundedSum):
    """A weight on a grid of integers, and beside it what a few entries are away from it, so that these are kept.

    The entries are those with the largest (w - q)^2 / (G^-1)_jj, what the error rises by, at the least, for rounding
    them to q, G the damped Gram matrix of the inputs. Without them the ranges of their groups are narrower, so the rest
    is rounded again, and they are chosen again, in turn; the first are those with the largest w^2 / (G^-1)_jj.
    Positions are stored and counted: an index for each entry, or one bit for each of the weight, whichever is less.
    """

    source = "arXiv 2306.03078; the choice in rounds is ours"
    summary = "Small integers plus the few entries on which they would lose most, kept beside them."

    size = "share"

    name: Literal["rounded_sparse"] = "rounded_sparse"
    share: float = Field(ge=0, le=0.5)  # of the entries, kept beside the integers; 0 is gptq
    correction_bits: Literal[2, 3, 4, 8] | None = 8  # of an entry; its position takes about 20 more

    def correction(self, in_features: int, out_features: int) -> Sparse | None:
        count = self._count(in_features, out_features)
        return None if count == 0 else Sparse(in_features, out_features, num_values=count)

    def _count(self, in_features: int, out_features: int) -> int:
        count = round(self.share * in_features * out_features)
        if count == 0 and self.share > 0:
            raise ValueError(
                f"rounded_sparse: share={self.share} keeps no entry of a {in_features}x{out_features} layer; the "
                f"smallest share that does is {1 / (in_features * out_features):.6f}, and 0 is gptq"
            )
        return count

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        """Nothing, and from an eighth of a percent on twice as many entries each time, up to an eighth."""
        numbers = in_features * out_features
        return (0.0, *(share for share in (2.0**-power for power in range(10, 2, -1)) if round(share * numbers) > 0))

    def pairs(self, problem: Problem, rounded: Quantized) -> Iterator[Pair]:
        lost = torch.cholesky_inverse(torch.linalg.cholesky(problem.gram)).diagonal()  # (I,)
        count = self._count(*problem.weight.shape[::-1])
        # On the grid of the whole weight the widest numbers lose least, and all others for them: they go first.
        missed = problem.weight
        while True:
            pair = self._pair(problem, largest(missed.square() / lost, num_values=count))
            missed = problem.weight - pair[0].to_dense().double()
            yield pair

    def _pair(self, problem: Problem, kept: Tensor) -> Pair:  # (O, I)
        """The rest rounded as if the entries that are kept lost nothing, and what these are away from the grid."""
        rest = torch.where(kept, 0, problem.weight)
        rounded = Quantized.of(Dense.from_dense(rest.to(problem.like)), **self.rounding_sizes)
        part, meant = packed_part(rounded, "matrix"), problem.weight
        if problem.is_corrected:
            grid = searched_grid(part, rest, problem.columns.sizes * ~kept)
            codes, meant = corrected_codes(part, meant, problem.columns, *grid, exact=kept)
            part.put(*grid, codes)
        away = meant - part.numbers(torch.float64)
        return rounded, self.rounded_beside(Sparse.from_mask(away.to(problem.like), kept))
