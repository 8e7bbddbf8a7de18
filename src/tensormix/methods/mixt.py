"""Tensor mixtures fitted to the weight, or to what it does with the calibration inputs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tensormix.fitting.mixt_aware import fit_aware
from tensormix.fitting.whitening import check_inputs
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import MixT
from tensormix.operators.base import computing_dtype
from tensormix.statistics import Gram


class _Needs:
    """What a method needs depends on its settings; asked of the class it is what the defaults need."""

    def __get__(self, method: Mixt | None, owner: type) -> tuple[type, ...]:
        return (Gram,) if method is not None and method.init == "aware" else ()


class Mixt(LinearMethod):
    """MixT, matched to the weight in closed form or to its outputs, or started from zero or at random for comparison.

    "aware" minimises tr((W - W') G (W - W')^T), the squared error of the outputs on inputs with Gram matrix G, by
    preconditioned conjugate gradients from the matched cores: see `mixt_normal` for what a step costs, and
    `conjugate_gradients` for when they end. With a white G it is "matched". G need not have full rank.

    "random" draws the numbers of all cores from one normal distribution whose width gives W the Frobenius norm of the
    dense weight in expectation. The generator is seeded by `seed` and the bytes of the weight, so that sites of equal
    shape differ and a site does not depend on the order of the others; equal weights get equal cores.
    """

    source = "arXiv 2605.25344, Eq. 1; the closed-form matching is ours"
    summary = "Mean of num_branches small cores, each acting on a window of neighbouring bonds."
    needs: ClassVar[Any] = _Needs()

    size = "num_branches"
    largest = 1

    name: Literal["mixt"] = "mixt"
    num_branches: int = Field(ge=1)  # N_T of the paper
    bond: int = Field(default=2, ge=2)  # d of the paper
    bonds: tuple[int, ...] | None = None  # with a budget: those among which it chooses one for each site
    padding: Literal["multiple", "power"] = "multiple"
    init: Literal["matched", "aware", "zero", "random"] = "matched"
    seed: int = 0  # of the random init
    tolerance: float = Field(default=1e-3, ge=0, allow_inf_nan=False)  # aware ends when 5 steps gain less of the error
    max_steps: int = Field(default=200, ge=1)  # of aware
    precision: Literal["float32", "float64"] = "float32"  # of aware; float64 weights are always fitted in it
    ridge: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # of aware: added to G, times its mean eigenvalue

    @field_validator("bonds", mode="before")
    @classmethod
    def _bonds(cls, bonds: Any) -> Any:
        if bonds is None:
            return None
        if (
            not isinstance(bonds, list | tuple)
            or not bonds
            or not all(type(bond) is int and bond > 1 for bond in bonds)
        ):
            raise ValueError(f"bonds are a list of whole numbers from 2 on, got {bonds!r}")
        if len(set(bonds)) < len(bonds):
            raise ValueError(f"bonds are each named once, got {bonds!r}")
        return tuple(bonds)

    @model_validator(mode="after")
    def _bonds_are_chosen(self) -> Mixt:
        if self.bonds is not None and self.num_branches != self.largest:
            raise ValueError(
                f"bonds are for a budget to choose from, and num_branches={self.num_branches} is chosen already: "
                "leave out num_branches, or give one bond"
            )
        return self

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[Any, ...]:
        """Every `num_branches`, or with `bonds` every pair of one and a bond; the largest layer first."""
        if self.bonds is None:
            return tuple(self._branches(self.bond, in_features, out_features))
        pairs = [(1, self.bonds[0])]  # one branch passes no bond through: the dense layer, whatever the bond
        for bond in self.bonds:
            pairs += [(count, bond) for count in self._branches(bond, in_features, out_features) if count > 1]
        return tuple(sorted(pairs, key=lambda pair: -self.sized(pair).empty(in_features, out_features).num_params))

    def sized(self, value: Any) -> Mixt:
        count, bond = (value, self.bond) if isinstance(value, int) else value
        return self.model_copy(update={"num_branches": count, "bond": bond, "bonds": None})

    def setting_of(self, value: Any) -> str:
        return "num_branches" if isinstance(value, int) else "num_branches, bond"

    def _branches(self, bond: int, in_features: int, out_features: int) -> Iterator[int]:
        for count in itertools.count(1):
            try:
                self.sized((count, bond)).empty(in_features, out_features)
            except ValueError:  # more branches than the widths have bonds for
                return
            yield count

    def empty(self, in_features: int, out_features: int) -> MixT:
        with torch.device("meta"):
            return self._build(in_features, out_features)

    def fit(self, weight: Tensor, stats: Statistics) -> MixT:  # (O, I)
        """Raises ValueError if init is "aware" and the inputs were all zero or not finite."""
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[MixT, dict[str, Any]]:  # (O, I)
        if self.init == "aware":
            return self._fit_aware(weight, stats[Gram].mean)
        return self._fit_alone(weight), {}

    def _fit_aware(self, weight: Tensor, gram: Tensor) -> tuple[MixT, dict[str, Any]]:  # (O, I), (I, I)
        check_inputs(gram)
        wide = weight.detach().to(torch.promote_types(computing_dtype(weight), getattr(torch, self.precision)))
        gram = gram.to(wide, copy=self.ridge > 0)
        if self.ridge > 0:
            gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        op = self._build(weight.shape[1], weight.shape[0]).to(wide)
        facts = fit_aware(op, wide, gram, tolerance=self.tolerance, max_steps=self.max_steps)
        return op.to(weight), facts

    def _fit_alone(self, weight: Tensor) -> MixT:  # (O, I)
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
