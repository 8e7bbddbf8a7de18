"""Tensor trains over paired factors of outputs and inputs.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.kronecker_scales import mode_scales, scaled, unscaled
from tensormix.fitting.train_ranks import Modes, train_keeps, train_ranks
from tensormix.fitting.whitened_fit import whitened
from tensormix.methods.base import Statistics
from tensormix.methods.weighted import Weighted
from tensormix.operators import StructuredLinear, TensorTrain
from tensormix.operators.tensor_train import check_modes, mode_factors, tt_svd
from tensormix.statistics import Gram


class TrainSettings(Weighted):
    """What the methods have in common that make a tensor train of a weight; `rank` is that of every bond whose sides
    allow as much.

    Raises ValueError unless both of `out_modes`, `in_modes` are given or none.
    """

    modes: int = Field(default=12, ge=1)  # how many pairs of factors, where they are not written out
    out_modes: tuple[int, ...] | None = Field(default=None, strict=False)
    in_modes: tuple[int, ...] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _both_modes(self) -> Self:
        if (self.out_modes is None) != (self.in_modes is None):
            raise ValueError(f"{self.name}: out_modes and in_modes are pairs; write out both, or none")
        return self

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        return tuple(train_keeps(self.modes_at(in_features, out_features), self.beside(in_features, out_features)))

    def beside(self, in_features: int, out_features: int) -> int:
        """How many numbers of `keep` go to something else than the train."""
        return 0

    def modes_at(self, in_features: int, out_features: int) -> Modes:
        """The factors of a layer. Raises ValueError if those written out are of other sizes."""
        if self.out_modes is None or self.in_modes is None:
            return Modes(mode_factors(out_features, self.modes), mode_factors(in_features, self.modes))
        check_modes(in_features, out_features, self.out_modes, self.in_modes)
        return Modes(list(self.out_modes), list(self.in_modes))

    def train_sizes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        """The sizes of the train. Raises ValueError if the layer does not allow what is asked for."""
        modes = self.modes_at(in_features, out_features)
        ranks = train_ranks(self.name, modes, self.keep, self.rank, self.beside(in_features, out_features))
        return {**modes._asdict(), "ranks": ranks}

    def empty_train(self, in_features: int, out_features: int) -> TensorTrain:
        sizes = self.train_sizes(in_features, out_features)
        with torch.device("meta"):
            return TensorTrain(in_features, out_features, **sizes)

    def fit_train(self, weight: Tensor, stats: Statistics) -> tuple[TensorTrain, dict[str, Any]]:  # (O, I)
        """The train nearest to `weight`, or to its outputs, in its dtype.

        With `weighted` the start is the better one of two closed forms, TT-SVD of the weight and TT-SVD of the weight
        scaled by a Kronecker product of the Gram matrix's marginals; then all cores are fitted together. So its error
        of the outputs is never above that of plain TT-SVD.
        """
        sizes = self.train_sizes(weight.shape[1], weight.shape[0])
        plain = TensorTrain.from_dense(weight.detach().double(), **sizes)
        if not self.weighted:
            return plain.to(weight), {}
        gram = stats[Gram].mean.double().to(weight.device)
        wide, root = whitened(weight, gram)
        scales = mode_scales(gram, sizes["in_modes"])
        cores, _ = tt_svd(scaled(wide, scales), **sizes)
        starts = [plain, TensorTrain.from_cores(wide, unscaled(cores, scales))]
        op, facts = self.fit_to_outputs(starts, wide, gram, root)
        return op.to(weight), facts


class TensorTrainMethod(TrainSettings):
    """The weight as a tensor train over pairs of factors of its outputs and inputs, by TT-SVD in fp64.

    The squared error is at most the sum of the squared singular values that are cut off at the bonds. With `weighted`
    it is fitted to the outputs on calibration inputs instead: see `fit_train`.
    """

    source = "Oseledets 2011, as in TT-LLM; the fit to the outputs is ours"
    summary = "A tensor train over paired factors of outputs and inputs, of the weight or fitted to the outputs."

    name: Literal["tensor_train"] = "tensor_train"

    def empty(self, in_features: int, out_features: int) -> StructuredLinear:
        return self.empty_train(in_features, out_features)

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[StructuredLinear, dict[str, Any]]:  # (O, I)
        return self.fit_train(weight, stats)
