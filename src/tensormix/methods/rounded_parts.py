"""What the methods share whose smaller layers may be rounded to integers in the same fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from pydantic import model_validator
from torch import Tensor

from tensormix.fitting.output_error import output_error
from tensormix.fitting.whitening import solved
from tensormix.methods.base import JointMethod, Statistics
from tensormix.methods.rounding import Rounding, Seen
from tensormix.operators import Dense, StructuredLinear
from tensormix.statistics import Gram, HeldOutGram

if TYPE_CHECKING:
    # The union of the methods that round. `tensormix.methods` resolves the name when its table is complete.
    AnyRounding = Rounding

EPSILON = torch.finfo(torch.float64).tiny  # of a weight whose outputs are all zero nothing can be missed


class RoundedParts(JointMethod):
    """The structure is fitted first, and each layer's smaller operator is rounded by the inputs that it is left with.

    A layer that was fitted by least squares to inputs z misses W x by something that z cannot tell, so what is nearest
    to it on the grid, by the Gram matrix of z, is nearest to W x too: one loss for both. The left one of two factors is
    fitted anew to what rounding made of the right one.
    """

    rounding: AnyRounding | None = None  # rtn, gptq or hqq, without `of`: how the numbers that stay are stored

    @model_validator(mode="after")
    def _rounds_what_it_fits(self) -> Self:
        if self.rounding is not None and self.rounding.of is not None:
            raise ValueError(
                f"{self.name}: rounding takes {self.rounding.name} without 'of', since {self.name} says what is rounded"
            )
        return self

    def with_rounding(self, needs: tuple[type, ...]) -> tuple[type, ...]:
        """What is needed beside these statistics, too."""
        more = () if self.rounding is None else self.rounding.needs
        return (*needs, *(kind for kind in more if kind not in needs))

    def seen(self, stats: Statistics | None, weight: Tensor) -> Seen | None:
        """What rounding has to know of the inputs of a layer."""
        if self.rounding is None or HeldOutGram not in self.rounding.needs:
            return None
        assert stats is not None and Gram in stats
        return Seen.of(stats, weight)

    def stored(self, operator: StructuredLinear, seen: Seen | None, weight: Tensor | None = None) -> StructuredLinear:
        """The operator, which was fitted to `weight` (O, I) if that is not what it is, rounded if that is asked for."""
        if self.rounding is None:
            return operator
        if weight is None:
            assert isinstance(operator, Dense)  # which is its own target
            weight = operator.matrix
        return self.rounding.rounded(operator, weight.detach(), seen)[0]

    def share_lost(self, weight: Tensor, gram: Tensor, seen: Seen | None) -> float:  # (O, I), (I, I)
        """What rounding the weight itself loses of its squared outputs: how loud the noise is that it adds to them."""
        assert self.rounding is not None
        weight, gram = weight.detach(), gram.to(weight.device).double()
        missed = weight - self.rounding.rounded(Dense.from_dense(weight), weight, seen)[0].to_dense()
        return output_error(missed.double(), gram) / max(output_error(weight.double(), gram), EPSILON)

    def stored_empty(self, operator: StructuredLinear) -> StructuredLinear:
        """The same on meta."""
        return operator if self.rounding is None else self.rounding.emptied(operator)


def through_noise(weight: Tensor, gram: Tensor, share: float) -> tuple[Tensor, Tensor]:  # (O, C), (C, C)
    """The matrix that makes W z of z and noise, by least squares, and the Gram matrix of both.

    The noise is as loud in all channels, and `share` of z altogether: W G (G + N)^-1, the filter of Wiener. What
    carries less than the noise is left alone instead of blown up. Without noise it is W.
    """
    noisy = gram.double() + share * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    wide = weight.detach().to(noisy)
    step = solved(noisy, wide @ (gram.double() - noisy))
    return (wide, gram) if step is None else (wide + step, noisy.to(gram))
