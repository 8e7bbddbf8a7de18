"""How heavy the tails of weight spectra are: sigma_i ~ i^-alpha (arXiv 2606.03465, Eq. 8 and Table 1).

alpha is the least-squares slope of log sigma_i against log i over a stated range of i; below 1/2 the tail holds
most of the squared norm, and what a truncation throws away grows with the size of the matrix.

Legend: O out_features, I in_features, E experts, K singular values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tensormix.diagnose.base import Diagnostic, Row
from tensormix.operators.base import computing_dtype
from tensormix.sites import Site, find_sites

MODES = ("expert", "output", "input")
FEWEST = 3  # points that a line with a stated quality needs


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """sigma_i = scale * i^-exponent for i in first..last (counted from 1)."""

    exponent: float
    scale: float
    r_squared: float  # of the fit in logarithms; 1 is a perfect power law
    first: int
    last: int


def fit_power_law(values: Tensor, start: float = 0.0, stop: float = 0.5) -> PowerLaw | None:  # (K,) falling
    """The power law of singular values between the fractions `start` and `stop` of their number.

    Values that are zero to rounding are left out; None where fewer than three of the range remain.
    """
    values = values.double()
    floor = float(values[0]) * len(values) * torch.finfo(torch.float32).eps if len(values) else 0.0
    first = math.floor(start * len(values)) + 1
    last = min(max(math.floor(stop * len(values)), first + FEWEST - 1), int((values > floor).sum()))
    if last - first + 1 < FEWEST:
        return None
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = values[first - 1 : last].log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    residual = y - y.mean() - slope * (x - x.mean())
    spread = float(((y - y.mean()) ** 2).sum())
    flat = spread < 1e-20 * len(y)  # a flat spectrum is a power law of exponent zero, and rounding is no residual
    quality = 1.0 if flat else 1 - float((residual**2).sum()) / spread
    scale = math.exp(float(y.mean()) - slope * float(x.mean()))
    return PowerLaw(exponent=0.0 - slope, scale=scale, r_squared=quality, first=first, last=last)


def mode_singular_values(stack: Tensor) -> dict[str, Tensor]:  # (E, O, I) -> (E,), (O,), (I,)
    """Singular values of the three unfoldings of a stack of experts, from Gram matrices in fp64, falling."""
    grams = {mode: torch.zeros(size, size, dtype=torch.float64) for mode, size in zip(MODES, stack.shape, strict=True)}
    flat = stack.flatten(1)
    grams["expert"] = (flat.double() @ flat.double().T).cpu()
    for expert in stack:
        wide = expert.double()
        grams["output"] += (wide @ wide.T).cpu()
        grams["input"] += (wide.T @ wide).cpu()
    return {mode: torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt() for mode, gram in grams.items()}


def spectra_of(site: Site) -> Iterator[tuple[str, Tensor]]:
    """(mode, singular values) of a site: "weight" for a matrix, the three unfoldings for a stack of experts."""
    if site.kind == "experts":
        yield from mode_singular_values(site.weight).items()
    else:
        yield "weight", torch.linalg.svdvals(site.weight.to(computing_dtype(site.weight))).cpu()


class Spectra(Diagnostic):
    """Exponent of the power law that the singular values follow, of every weight and of expert stacks' unfoldings.

    Rows of kind "spectrum" with the exponent, the range of indices it was fitted on and r squared; exponent None where
    fewer than three singular values in the range are not zero.
    """

    looks_at: ClassVar[Literal["dense", "pair"]] = "dense"
    needs: ClassVar[tuple[str, ...]] = ()
    name: Literal["spectra"] = "spectra"
    start: float = Field(default=0.0, ge=0, lt=1)  # fraction of the singular values before the fitted range
    stop: float = Field(default=0.5, gt=0, le=1)  # fraction at which the range ends
    blocks: tuple[int, ...] | None = None  # all without it

    def measure(self, model: nn.Module) -> list[Row]:
        rows = []
        for site in find_sites(model):
            if site.kind == "block" or (self.blocks is not None and site.block not in self.blocks):
                continue
            for mode, values in spectra_of(site):
                fit = fit_power_law(values, self.start, self.stop)
                rows.append(
                    {
                        "kind": "spectrum",
                        "site": site.name,
                        "block": site.block,
                        "role": site.role,
                        "mode": mode,
                        "exponent": fit.exponent if fit else None,
                        "r_squared": fit.r_squared if fit else None,
                        "first": fit.first if fit else None,
                        "last": fit.last if fit else None,
                        "num_values": len(values),
                    }
                )
        return rows
