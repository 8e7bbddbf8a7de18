"""Tensor trains over paired factors of outputs and inputs.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.kronecker_scales import mode_scales, scaled, unscaled
from tensormix.fitting.output_error import output_error
from tensormix.fitting.whitened_fit import fit_whitened, whitened
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import StructuredLinear, TensorTrain
from tensormix.operators.tensor_train import check_modes, largest_ranks, mode_factors, num_params, tt_svd
from tensormix.statistics import Gram


class _Needs:
    """What a method needs depends on its settings; asked of the class it is what the defaults need."""

    def __get__(self, method: TrainSettings | None, owner: type) -> tuple[type, ...]:
        return (Gram,) if method is not None and method.weighted else ()


class TrainSettings(LinearMethod):
    """What the methods have in common that make a tensor train of a weight.

    Raises ValueError unless exactly one of `keep` and `rank` is given, and both of `out_modes`, `in_modes` or none.
    """

    needs: ClassVar[Any] = _Needs()

    size = "keep"
    largest = 1.0

    keep: float | None = Field(default=None, gt=0, le=1)  # fraction of the dense numbers
    rank: int | None = Field(default=None, ge=1)  # of every bond, where the sides of the bond allow as much
    modes: int = Field(default=12, ge=1)  # how many pairs of factors, where they are not written out
    out_modes: tuple[int, ...] | None = Field(default=None, strict=False)
    in_modes: tuple[int, ...] | None = Field(default=None, strict=False)
    weighted: bool = False  # whether the error of the outputs on calibration inputs counts, or that of the weight
    steps: int = Field(default=100, ge=0)  # of L-BFGS at most, with `weighted`; 0 leaves the closed form

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.keep is None) == (self.rank is None):
            got = "none of them" if self.rank is None else "both"
            raise ValueError(f"{self.name}: takes either keep (a fraction) or rank (of the bonds), got {got}")
        if (self.out_modes is None) != (self.in_modes is None):
            raise ValueError(f"{self.name}: out_modes and in_modes are pairs; write out both, or none")
        return self

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        """The least `keep`, to six digits, of every rank that is the largest within some 64th of the dense numbers."""
        out_modes, in_modes = self.modes_at(in_features, out_features)
        dense, found = in_features * out_features, []
        for step in range(1, 65):
            rank = _largest_rank(out_modes, in_modes, dense * step // 64 - self.beside(in_features, out_features))
            if rank:
                count = num_params(out_modes, in_modes, _capped(out_modes, in_modes, rank))
                found.append(min(1.0, ceil((count + self.beside(in_features, out_features)) / dense * 1e6) / 1e6))
        return tuple(dict.fromkeys(found))

    def beside(self, in_features: int, out_features: int) -> int:
        """How many numbers of `keep` go to something else than the train."""
        return 0

    def modes_at(self, in_features: int, out_features: int) -> tuple[list[int], list[int]]:
        """The factors of the outputs and of the inputs. Raises ValueError if those written out are of other sizes."""
        if self.out_modes is None or self.in_modes is None:
            return mode_factors(out_features, self.modes), mode_factors(in_features, self.modes)
        check_modes(in_features, out_features, self.out_modes, self.in_modes)
        return list(self.out_modes), list(self.in_modes)

    def train_sizes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        """The sizes of the train.

        Raises:
            ValueError: the factors do not fit, no rank fits into `keep`, or `rank` is more than possible or would hold
                more numbers than the dense weight.
        """
        out_modes, in_modes = self.modes_at(in_features, out_features)
        dense, beside = in_features * out_features, self.beside(in_features, out_features)
        room = dense if self.keep is None else floor(self.keep * dense + 1e-9)  # the margin undoes its rounding
        largest = _largest_rank(out_modes, in_modes, room - beside)
        layer = f"a {in_features}x{out_features} layer"
        if largest == 0:
            least = num_params(out_modes, in_modes, [1] * (len(out_modes) - 1)) + beside
            if least > dense:
                raise ValueError(
                    f"{self.name}: rank 1 of {layer} stores {least} numbers, the dense weight {dense}; leave this "
                    "layer dense."
                )
            smallest = ceil(least / dense * 1e6) / 1e6
            raise ValueError(
                f"{self.name}: keep={self.keep} leaves no rank for {layer}; the smallest usable keep is {smallest:g}."
            )
        if self.rank is not None and self.rank > largest:
            possible = max(largest_ranks(out_modes, in_modes), default=1)
            why = "no bond can have more than" if self.rank > possible else "it would hold more numbers than the dense"
            why = f"{why} {possible}" if self.rank > possible else f"{why} weight"
            raise ValueError(
                f"{self.name}: rank {self.rank} is too large for {layer} with out_modes {out_modes} and in_modes "
                f"{in_modes}: {why}; the largest usable rank is {largest}."
            )
        rank = largest if self.rank is None else self.rank
        return {"out_modes": out_modes, "in_modes": in_modes, "ranks": _capped(out_modes, in_modes, rank)}

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
        op = min(starts, key=lambda start: output_error(wide - start.to_dense().detach(), gram))
        facts = fit_whitened(op, wide, root, steps=self.steps) if self.steps else {}
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

    def fit(self, weight: Tensor, stats: Statistics) -> StructuredLinear:  # (O, I)
        """Raises ValueError if the layer does not allow the sizes, or the inputs were all zero or not finite."""
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[StructuredLinear, dict[str, Any]]:  # (O, I)
        return self.fit_train(weight, stats)


def _capped(out_modes: list[int], in_modes: list[int], rank: int) -> list[int]:
    return [min(rank, most) for most in largest_ranks(out_modes, in_modes)]


def _largest_rank(out_modes: list[int], in_modes: list[int], room: int) -> int:
    """The largest rank whose cores hold at most `room` numbers, or 0: they grow with it."""
    low, high = 0, max(largest_ranks(out_modes, in_modes), default=1)
    while low < high:
        rank = (low + high + 1) // 2
        fits = num_params(out_modes, in_modes, _capped(out_modes, in_modes, rank)) <= room
        low, high = (rank, high) if fits else (low, rank - 1)
    return low
