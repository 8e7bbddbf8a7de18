"""The null methods that every other one must be better than: a layer replaced by nothing, or by a constant."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import Zero
from tensormix.operators.base import computing_dtype
from tensormix.statistics import InputMean


class ZeroMethod(LinearMethod):
    """W = 0: the layer is switched off."""

    source = "ours"
    summary = "The layer's weight is zero and holds no parameters."

    name: Literal["zero"] = "zero"

    @property
    def is_differentiable(self) -> bool:
        return False

    def empty(self, in_features: int, out_features: int) -> Zero:
        with torch.device("meta"):
            return Zero(in_features, out_features)

    def fit(self, weight: Tensor, stats: Statistics) -> Zero:  # (O, I)
        return Zero.from_dense(weight)


class MeanOutput(LinearMethod):
    """W = 0 and a bias of W_dense @ mean(x): of all constants the nearest to the calibration outputs."""

    source = "ours"
    summary = "The layer is replaced by its mean output over the calibration inputs."
    needs = (InputMean,)

    name: Literal["mean_output"] = "mean_output"

    def empty(self, in_features: int, out_features: int) -> Zero:
        with torch.device("meta"):
            op = Zero(in_features, out_features)
            op.bias = nn.Parameter(torch.empty(out_features))
        return op

    def fit(self, weight: Tensor, stats: Statistics) -> Zero:  # (O, I)
        op = Zero.from_dense(weight)
        wide = weight.detach().to(computing_dtype(weight))
        op.bias = nn.Parameter((wide @ stats[InputMean].mean.to(wide)).to(weight.dtype))  # (O,)
        return op
