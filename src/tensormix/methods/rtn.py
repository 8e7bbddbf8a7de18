"""Round to nearest."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from tensormix.methods.rounding import Rounding, Seen
from tensormix.operators import Quantized, StructuredLinear


class Rtn(Rounding):
    """Every number becomes the nearest multiple of its scale; no data of its own.

    The published baseline of arXiv 2606.03465 is granularity "tensor", symmetric: bits * numel + 16 bits for a matrix,
    for dense weights and for the cores and factors of decompositions alike.
    """

    source = "arXiv 2606.03465, its RTN baseline"
    summary = "Small integers and a scale for each group of them, for the weight or for what another method fits to it."

    name: Literal["rtn"] = "rtn"

    def rounded(
        self, inner: StructuredLinear, weight: Tensor, seen: Seen | None
    ) -> tuple[Quantized, dict[str, Any]]:  # (O, I)
        return Quantized.of(inner, **self.rounding_sizes), {}
