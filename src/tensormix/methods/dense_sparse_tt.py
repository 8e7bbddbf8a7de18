"""A tensor train beside the few entries that it would lose the most on.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from math import floor
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.methods.base import Statistics
from tensormix.methods.tensor_train import TrainSettings
from tensormix.operators import Sparse, StructuredLinear, Sum
from tensormix.operators.base import computing_dtype
from tensormix.operators.sparse import largest
from tensormix.statistics import Gram, InputNorms


class DenseSparseTt(TrainSettings):
    """The entries with the largest scores as they are, and a tensor train of the weight without them.

    An entry's score is its magnitude, or with `selector: activation` that times the root mean square of its input.
    `keep` counts the numbers of both terms; the positions of the entries come on top: see `Sparse`.
    """

    source = "TT-LLM; with a fit to the outputs ours"
    summary = "The entries with the largest scores, and a tensor train of the rest."

    name: Literal["dense_sparse_tt"] = "dense_sparse_tt"
    share: float = Field(default=1e-6, gt=0, lt=1)  # fraction of the entries that stay, and at least one
    selector: Literal["magnitude", "activation"] = "magnitude"

    def statistics(self) -> tuple[type, ...]:
        return super().statistics() or ((InputNorms,) if self.selector == "activation" else ())

    def beside(self, in_features: int, out_features: int) -> int:
        return max(1, floor(self.share * in_features * out_features + 1e-9))  # the margin undoes its rounding

    def empty(self, in_features: int, out_features: int) -> StructuredLinear:
        with torch.device("meta"):
            sparse = Sparse(in_features, out_features, num_values=self.beside(in_features, out_features))
            return Sum(terms=[sparse, self.empty_train(in_features, out_features)])

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[StructuredLinear, dict[str, Any]]:  # (O, I)
        O, I = weight.shape
        scores = weight.detach().to(computing_dtype(weight)).abs()
        if self.selector == "activation":
            scores = scores * self._input_sizes(stats).to(scores)
        mask = largest(scores, num_values=self.beside(I, O))
        train, facts = self.fit_train(weight.detach().masked_fill(mask, 0), stats)
        return Sum(terms=[Sparse.from_mask(weight.detach(), mask), train]).to(weight), facts

    def _input_sizes(self, stats: Statistics) -> Tensor:  # (I,)
        sizes = stats[Gram].mean.diagonal().sqrt() if self.weighted else stats[InputNorms].rms
        if not sizes.isfinite().all():
            raise ValueError("the calibration inputs hold NaN or infinite values")
        return sizes
