"""The error of a compressed weight in the spectral norm, beside its bound (arXiv 2606.03465, Eq. 7).

Eckart and Young: no matrix of rank k is nearer to W than sigma_{k+1} in the spectral norm. How many times farther a
compressed W' is, and how far the bound lets it be:

    ||W - W'||_2 / sigma_{k+1}  <=  sqrt(d) * sqrt(1 + sum_{i > k+1} (sigma_i / sigma_{k+1})^2)

The bound holds for a quasi-optimal truncation of order d whose unfolding has rank k; for another operator the row shows
whether it would.

Legend: O out_features, I in_features, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tensormix.diagnose.base import Diagnostic, Row
from tensormix.operators import DenseStack, StackedLinear, StructuredLinear
from tensormix.sites import Site, find_sites


class SpectralGap(Diagnostic):
    """Spectral error of every compressed weight in units of the best possible at its rank, beside the bound.

    k is the rank of the compressed weight; where that is full, the largest rank of which two factors hold no more
    numbers than the operator (`rank_of` says which). Experts are compared in the unfoldings of their stack whose rank
    fell. Rows of kind "spectral_gap"; `value` is None where W itself has rank k.

    Raises ValueError without a reference.
    """

    looks_at: ClassVar[Literal["dense", "pair"]] = "pair"
    needs: ClassVar[tuple[str, ...]] = ("reference",)
    name: Literal["spectral_gap"] = "spectral_gap"
    order: int = Field(default=2, ge=2)  # d, the number of modes that the method truncates; 3 for stacks of experts

    def measure(self, model: nn.Module, reference: nn.Module) -> list[Row]:
        modules = dict(model.named_modules())
        rows = []
        for site in find_sites(reference):
            for mode, weight, made, rank, rank_of, order in self._matrices(site, modules.get(site.name)):
                value, bound = spectral_gap(weight, made, rank, order)
                labels = {"site": site.name, "block": site.block, "role": site.role, "mode": mode}
                rows.append({"kind": "spectral_gap", **labels, "rank": rank, "rank_of": rank_of, "order": order,
                             "value": value, "bound": bound})  # fmt: skip
        return rows

    def _matrices(self, site: Site, operator: nn.Module | None) -> Iterator[tuple[Any, ...]]:
        """(mode, W, W', k, what k is, d) of one site; nothing where it was not compressed."""
        if isinstance(operator, StructuredLinear):
            weight, made = site.weight.double().cpu(), operator.to_dense().detach().double().cpu()
            rank, of = _rank(made), "the operator"
            if rank == min(made.shape):
                rank, of = min(operator.num_params // sum(made.shape), min(made.shape) - 1), "equal parameters"
            yield "weight", weight, made, rank, of, self.order
        elif isinstance(operator, StackedLinear) and not isinstance(operator, DenseStack):
            stack, other = site.weight.double().cpu(), operator.to_dense().detach().double().cpu()
            for axis, mode in enumerate(("expert", "output", "input")):
                weight, made = (x.movedim(axis, 0).flatten(1) for x in (stack, other))
                if (rank := _rank(made)) < min(made.shape):
                    yield mode, weight, made, rank, "the unfolding", 3


def _rank(matrix: Tensor) -> int:
    """Rank up to the rounding of what was computed in fp32."""
    values = torch.linalg.svdvals(matrix)
    return int((values > values[0] * max(matrix.shape) * torch.finfo(torch.float32).eps).sum())


def spectral_gap(weight: Tensor, made: Tensor, rank: int, order: int) -> tuple[float | None, float | None]:
    """||W - W'||_2 / sigma_{k+1} and its bound, of matrices in fp64; None where sigma_{k+1} is zero to rounding."""
    values = torch.linalg.svdvals(weight)
    tail = values[rank:]
    if float(tail[0]) <= float(values[0]) * max(weight.shape) * torch.finfo(torch.float64).eps:
        return None, None
    error = float(torch.linalg.matrix_norm(weight - made, ord=2))
    return error / float(tail[0]), math.sqrt(order * float((tail / tail[0]).square().sum()))
