"""Tensor mixtures fitted by the weight alone."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import MixT


class Mixt(LinearMethod):
    """MixT, matched to the weight in closed form, or started from zero or at random for comparison.

    "random" draws the numbers of all cores from one normal distribution whose width gives W the Frobenius norm of the
    dense weight in expectation. The generator is seeded by `seed` and the bytes of the weight, so that sites of equal
    shape differ and a site does not depend on the order of the others; equal weights get equal cores.
    """

    source = "arXiv 2605.25344, Eq. 1; the closed-form matching is ours"
    summary = "Mean of num_branches small cores, each acting on a window of neighbouring bonds."

    name: Literal["mixt"] = "mixt"
    num_branches: int = Field(ge=1)  # N_T of the paper
    bond: int = Field(default=2, ge=2)  # d of the paper
    padding: Literal["multiple", "power"] = "multiple"
    init: Literal["matched", "zero", "random"] = "matched"
    seed: int = 0  # of the random init

    def empty(self, in_features: int, out_features: int) -> MixT:
        with torch.device("meta"):
            return self._build(in_features, out_features)

    def fit(self, weight: Tensor, stats: Statistics) -> MixT:  # (O, I)
        if self.init == "matched":
            return MixT.from_dense(weight, num_branches=self.num_branches, bond=self.bond, padding=self.padding)
        O, I = weight.shape
        op = self._build(I, O).to(weight)
        with torch.no_grad():
            if self.init == "zero":
                for core in op.cores:
                    core.zero_()
            else:
                self._draw(op, weight)
        return op

    def _build(self, in_features: int, out_features: int) -> MixT:
        return MixT(in_features, out_features, num_branches=self.num_branches, bond=self.bond, padding=self.padding)

    def _draw(self, op: MixT, weight: Tensor) -> None:  # (O, I)
        # E ||W||^2 = std^2 / num_branches^2 * (number of entries of W that the numbers of all cores are added to)
        count = sum(_num_images(op, left, right) for left, right in op.windows)
        std = self.num_branches * float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / count**0.5
        generator = torch.Generator().manual_seed(_seed(self.seed, weight))
        for core in op.cores:
            core.copy_(std * torch.randn(core.shape, generator=generator))


def _num_images(op: MixT, left: int, right: int) -> int:
    """How many entries of the cropped W the branch with these passed-through sizes writes."""
    kept = []
    for core_size, size in ((op.core_out, op.out_features), (op.core_in, op.in_features)):
        indices = torch.arange(left * core_size * right).view(left, core_size, right)
        kept.append((indices < size).sum(1))  # (L, R)
    return int((kept[0] * kept[1]).sum())


def _seed(seed: int, weight: Tensor) -> int:
    content = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.blake2b(str((seed, tuple(weight.shape))).encode(), digest_size=8)
    digest.update(content.data)
    return int.from_bytes(digest.digest(), "big") >> 1  # 63 bits: what torch takes
