"""Round to nearest."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tensormix.methods.base import Statistics
from tensormix.methods.rounding import Rounding
from tensormix.operators import Dense, Quantized


class Rtn(Rounding):
    """Every number becomes the nearest multiple of its scale; no data of its own.

    The published baseline of arXiv 2606.03465 is granularity "tensor", symmetric: bits * numel + 16 bits for a matrix,
    for dense weights and for the cores and factors of decompositions alike.
    """

    source = "arXiv 2606.03465, its RTN baseline"
    summary = "Small integers and a scale for each group of them, for the weight or for what another method fits to it."

    name: Literal["rtn"] = "rtn"

    def fit(self, weight: Tensor, stats: Statistics) -> Quantized:  # (O, I)
        inner = Dense.from_dense(weight) if self.of is None else self.of.fit(weight, stats)
        return Quantized.of(inner, **self.rounding_sizes)
