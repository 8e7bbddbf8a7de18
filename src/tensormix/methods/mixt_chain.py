"""Tensor mixtures one after another, and one between two cheap changes of basis.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.mixt_aware import fit_aware
from tensormix.fitting.whitened_fit import fit_whitened, whitened
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import Chain, Kronecker, MixT
from tensormix.operators.chain import start_chain
from tensormix.statistics import Gram


def saving_branches(method: MixtChain | MixtRotated, in_features: int, out_features: int) -> tuple[int, ...]:
    """Every `num_branches` of an operator that the layer allows and that holds fewer numbers than the dense weight."""
    found = {}
    for count in range(1, in_features.bit_length() + out_features.bit_length()):
        try:
            found[count] = method.sized(count).empty(in_features, out_features).num_params
        except ValueError:  # more branches than the widths have bonds for
            break
    smaller = {size: count for count, size in sorted(found.items()) if size < in_features * out_features}
    return tuple(smaller[size] for size in sorted(smaller, reverse=True))


class MixtChain(LinearMethod):
    """A product of `num_factors` mixtures with perfect shuffles between, fitted together to the outputs.

    All factors but one are square, of the smaller size of the layer; the other one stands on the side of the larger.
    No closed form is known. The fit is L-BFGS on the dense form of the product: some seconds for widths of some
    hundred, and hours at a width of 4096. It begins near the identity and ends in a valley of its own; another `seed`
    ends in another, of nearly the same depth wherever that was looked at.
    """

    source = "ours"
    summary = "Several MixT one after another with index shuffles between, fitted together to the outputs."
    needs = (Gram,)
    size = "num_branches"

    name: Literal["mixt_chain"] = "mixt_chain"
    num_branches: int = Field(ge=1)  # of every factor
    num_factors: int = Field(default=3, ge=1)
    bond: int = Field(default=2, ge=2)
    shuffle: int = Field(default=2, ge=1)  # of the perfect shuffle between two factors; 1 is none
    steps: int = Field(default=200, ge=1)  # of L-BFGS, at most
    seed: int = 0  # of the start

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[int, ...]:
        """Every number of branches that saves numbers; the largest layer first."""
        return saving_branches(self, in_features, out_features)

    def empty(self, in_features: int, out_features: int) -> Chain:
        with torch.device("meta"):
            return self._build(in_features, out_features)

    def fit(self, weight: Tensor, stats: Statistics) -> Chain:  # (O, I)
        """Raises ValueError if the layer does not allow the sizes, or the inputs were all zero or not finite."""
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[Chain, dict[str, Any]]:  # (O, I)
        op = self._build(weight.shape[1], weight.shape[0]).to(weight).double()
        wide, root = whitened(weight, stats[Gram].mean)
        start_chain(op, wide, self.seed)
        facts = fit_whitened(op, wide, root, steps=self.steps)
        return op.to(weight), facts

    def _build(self, in_features: int, out_features: int) -> Chain:
        inner = min(in_features, out_features)
        sizes = [out_features, *[inner] * (self.num_factors - 1), in_features]
        factors = [
            MixT(columns, rows, num_branches=self.num_branches, bond=self.bond) for rows, columns in pairwise(sizes)
        ]
        return Chain(factors=factors, shuffle=self.shuffle)


class MixtRotated(LinearMethod):
    """MixT between two learned changes of basis, each a Kronecker product of two small matrices.

    Begins at the identity around the mixture that is best on the inputs, so it is never worse than that one; then all
    numbers are fitted together, as in `mixt_chain`. The bases come out invertible but not orthogonal, which would save
    no number.
    """

    source = "ours"
    summary = "MixT between two learned Kronecker-factored changes of basis, fitted together to the outputs."
    needs = (Gram,)
    size = "num_branches"

    name: Literal["mixt_rotated"] = "mixt_rotated"
    num_branches: int = Field(ge=1)
    bond: int = Field(default=2, ge=2)
    outer: int = Field(default=8, ge=1)  # size of the first factor of both bases; must divide both sizes of the layer
    steps: int = Field(default=200, ge=1)  # of L-BFGS, at most

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[int, ...]:
        """Every number of branches that saves numbers; the largest layer first."""
        return saving_branches(self, in_features, out_features)

    def empty(self, in_features: int, out_features: int) -> Chain:
        with torch.device("meta"):
            return self._build(in_features, out_features)

    def fit(self, weight: Tensor, stats: Statistics) -> Chain:  # (O, I)
        """Raises ValueError if the layer does not allow the sizes, or the inputs were all zero or not finite."""
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[Chain, dict[str, Any]]:  # (O, I)
        wide, root = whitened(weight, stats[Gram].mean)
        op = self._build(weight.shape[1], weight.shape[0]).to(wide)
        outputs, mixture, inputs = op.factors
        assert isinstance(outputs, Kronecker) and isinstance(mixture, MixT) and isinstance(inputs, Kronecker)
        with torch.no_grad():
            for basis in (outputs, inputs):
                for part in (basis.outer_factor, basis.inner_factor):
                    part.copy_(torch.eye(len(part)))
        fit_aware(mixture, wide, root @ root.T, tolerance=1e-3, max_steps=200)
        facts = fit_whitened(op, wide, root, steps=self.steps)
        return op.to(weight), facts

    def _build(self, in_features: int, out_features: int) -> Chain:
        outputs = Kronecker(out_features, out_features, outer=self.outer)
        mixture = MixT(in_features, out_features, num_branches=self.num_branches, bond=self.bond)
        return Chain(factors=[outputs, mixture, Kronecker(in_features, in_features, outer=self.outer)])
