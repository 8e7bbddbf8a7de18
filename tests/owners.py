"""Owners for tests: a basis that several sites share, with a core for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.operators import Dense, Owner, StructuredLinear, View
from tensormix.sites import find_sites, install
from tensormix.sites.installing import install_owners


class SharedBasis(Owner):
    """W_part = core_part @ basis: of q, k, v and o of one attention, or of the same role of several blocks.

    Both are operators themselves, quantised ones perhaps, and called as modules.
    """

    def __init__(self, *, basis: StructuredLinear, cores: Mapping[str, StructuredLinear]) -> None:
        super().__init__()
        self.basis, self.cores = basis, nn.ModuleDict(cores)

    @classmethod
    def fit(cls, weights: Mapping[str, Tensor], rank: int) -> SharedBasis:  # (O, I) each, of one I
        """The nearest one in the Frobenius norm: the right singular vectors of all weights above each other."""
        stacked = torch.cat(list(weights.values()))
        basis = torch.linalg.svd(stacked.double(), full_matrices=False).Vh[:rank].to(stacked)
        cores = {part: Dense.from_dense(weight @ basis.T) for part, weight in weights.items()}
        return cls(basis=Dense.from_dense(basis), cores=cores)

    def _core(self, part: str) -> Any:
        return self.cores[part]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {part: (self._core(part).out_features, self.basis.in_features) for part in self.cores}

    @property
    def sizes(self) -> dict[str, Any]:
        return {"basis": self.basis.spec, "cores": {part: self._core(part).spec for part in self.cores}}

    def multiply(self, x: Tensor, part: str) -> Tensor:  # (..., I) -> (..., O)
        return self._core(part)(self.basis(x))

    def to_dense(self, part: str) -> Tensor:  # (O, I)
        return torch.einsum("or,ri->oi", self._core(part).to_dense(), self.basis.to_dense())

    def macs_of(self, part: str) -> int:
        return self.basis.macs_per_token + self._core(part).macs_per_token


def share(model: nn.Module, names: list[str], rank: int = 8, name: str = "basis") -> SharedBasis:
    """Replace these sites of `model` by views of one owner, which is fitted to their weights."""
    sites = {site.name: site for site in find_sites(model)}
    parts = {str(number): sites[name] for number, name in enumerate(names)}
    owner = SharedBasis.fit({part: site.weight for part, site in parts.items()}, rank)
    views: dict[str, View] = {parts[part].name: view for part, view in owner.views(name).items()}
    install_owners(model, views)
    for site, view in views.items():
        install(model, site, view)
    return owner


def attention(block: int) -> list[str]:
    """q, k, v and o of a block of LLaMA and the like, where heads are as wide as the stream."""
    return [f"model.layers.{block}.self_attn.{role}_proj" for role in "qkvo"]


def across(role: str = "mlp.gate_proj", blocks: tuple[int, ...] = (1, 2, 3)) -> list[str]:
    """The same role of several blocks."""
    return [f"model.layers.{block}.{role}" for block in blocks]
