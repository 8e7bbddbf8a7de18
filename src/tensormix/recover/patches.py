"""The shapes of a patch: what it is made of, where it begins, and which of its matrices carries its scale.

Every patch begins as exactly nothing, because the matrix that its outputs leave by is zero; the others are drawn, so
that this one learns from the first step on. alpha / rank is part of the matrix that the inputs enter by: a patch is an
operator and nothing else.

    low_rank    B A                              LoRA, arXiv 2106.09685
    loretta     B A, both of them tensor trains  LoRETTA (its reparameterised form), arXiv 2402.11417
    tt_lora     one tensor train                 TT-LoRA, arXiv 2408.01008

The trains are those of the papers: their cores belong to factors of the inputs and then to factors of the outputs,
each to one factor alone. That is a `TensorTrain` whose other mode is 1.

Shape letters: I in_features, O out_features, R rank of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from tensormix.operators import Chain, LowRank, StructuredLinear, TensorTrain
from tensormix.operators.tensor_train import largest_ranks, mode_factors
from tensormix.settings import Lora


class Patch(NamedTuple):
    operator: StructuredLinear
    scaled: nn.Parameter  # the matrix that is alpha / rank as large as in the papers

    @property
    def others(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.operator.parameters() if parameter is not self.scaled]


def make_patch(I: int, O: int, settings: Lora, random: torch.Generator) -> Patch:
    """A patch of an (O, I) matrix that changes nothing yet; what is drawn comes from `random`."""
    return {"low_rank": _low_rank, "loretta": _two_trains, "tt_lora": _train}[settings.form](I, O, settings, random)


@torch.no_grad()
def _low_rank(I: int, O: int, settings: Lora, random: torch.Generator) -> Patch:
    patch = LowRank(I, O, rank=min(settings.rank, I, O))
    patch.left.zero_()
    patch.right.uniform_(-1, 1, generator=random).mul_(settings.scale / math.sqrt(I))
    return Patch(patch, patch.right)


def _two_trains(I: int, O: int, settings: Lora, random: torch.Generator) -> Patch:
    R = min(settings.rank, I, O)
    left = _empty_train([R], mode_factors(O, settings.modes), settings.bond)
    right = _empty_train(mode_factors(I, settings.modes), [R], settings.bond)
    _draw(left, 1.0, random)
    _draw(right, 1 / (3 * I), random, whole=True)
    return Patch(Chain(factors=[left, right]), _scale(right, settings.scale))


def _train(I: int, O: int, settings: Lora, random: torch.Generator) -> Patch:
    train = _empty_train(mode_factors(I, settings.modes), mode_factors(O, settings.modes), settings.rank)
    _draw(train, 1 / (3 * I), random)
    return Patch(train, _scale(train, settings.scale))


def _empty_train(in_factors: Sequence[int], out_factors: Sequence[int], bond: int) -> TensorTrain:
    """Cores of the inputs and then of the outputs; every bond as asked, or as large as it can be."""
    in_modes, out_modes = [*in_factors, *[1] * len(out_factors)], [*[1] * len(in_factors), *out_factors]
    ranks = [min(bond, largest) for largest in largest_ranks(out_modes, in_modes)]
    I, O = math.prod(in_modes), math.prod(out_modes)
    return TensorTrain(I, O, out_modes=out_modes, in_modes=in_modes, ranks=ranks)


@torch.no_grad()
def _draw(train: TensorTrain, variance: float, random: torch.Generator, *, whole: bool = False) -> None:
    """Normal cores, so that the entries of their product have this variance; unless `whole` the last core is 0, and the
    product is that of the others."""
    drawn, last = list(train.parameters()), len(train.ranks)
    drawn = drawn if whole else drawn[:last]
    terms = math.prod(train.ranks[: len(drawn) - 1])  # products of entries that add up to one of theirs
    for core in drawn:
        core.normal_(std=(variance / terms) ** (1 / (2 * len(drawn))), generator=random)
    if not whole:
        train.get_parameter(f"core_{last}").zero_()


@torch.no_grad()
def _scale(train: TensorTrain, scale: float) -> nn.Parameter:
    first = train.get_parameter("core_0")
    first.mul_(scale)
    return first
