"""Factors of many matrices over few shared bases: W_e ~ own_e (sum over b of mixing[e, b] bases[b]).

Shape letters: E matrices (L, M) of one shape, B bases of rank T. All is computed in the dtype of the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SharedBases:
    """own (E, L, T), bases (B, T, M) and mixing (E, B)."""

    own: Tensor
    bases: Tensor
    mixing: Tensor

    def mixed(self) -> Tensor:  # (E, T, M)
        return torch.einsum("eb,btm->etm", self.mixing, self.bases)

    def squared_error(self, weight: Tensor) -> float:  # (E, L, M)
        return float((weight - self.own @ self.mixed()).square().sum())


def grouped(weight: Tensor, num_bases: int, rank: int, rounds: int) -> SharedBases:  # (E, L, M)
    """One basis for each group of matrices: the right singular vectors of the group, each matrix in its best group.

    It begins with consecutive groups, as published. Each round makes the best bases for the groups and then the best
    groups for the bases, so that the error never grows. Every group keeps at least one matrix.
    """
    E = len(weight)
    groups = torch.arange(E, device=weight.device) * num_bases // E
    for number in range(rounds + 1):
        bases = torch.stack([_right_vectors(weight[groups == group], rank) for group in range(num_bases)])
        if number == rounds:
            break
        held = torch.stack([(weight @ basis.T).square().sum((1, 2)) for basis in bases])  # (B, E)
        better = held.argmax(0)
        if len(better.unique()) < num_bases or bool((better == groups).all()):
            break
        groups = better
    mixing = torch.nn.functional.one_hot(groups, num_bases).to(weight)
    return SharedBases(weight @ bases[groups].mT, bases, mixing)


def _right_vectors(matrices: Tensor, rank: int) -> Tensor:  # (n, L, M) -> (T, M)
    rows = matrices.flatten(0, 1)
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -rank:].flip(1).T


def improved(found: SharedBases, weight: Tensor, steps: int, tolerance: float) -> SharedBases:  # (E, L, M)
    """Alternating least squares: own, mixing and each basis in turn is the best for the others.

    No step has a larger error than the one before. It ends after `steps`, or when one gains less than `tolerance` of
    the squared norm of all.
    """
    total, before = float(weight.square().sum()), found.squared_error(weight)
    for _ in range(steps):
        mixed = found.mixed()
        found = SharedBases(_solved(mixed @ mixed.mT, mixed @ weight.mT).mT, found.bases, found.mixing)
        found = SharedBases(found.own, found.bases, _best_mixing(found, weight))
        found = SharedBases(found.own, _best_bases(found, weight), found.mixing)
        error = found.squared_error(weight)
        if before - error <= tolerance * total:
            break
        before = error
    return found


def _best_mixing(found: SharedBases, weight: Tensor) -> Tensor:  # (E, B)
    rows = []
    for own, matrix in zip(found.own, weight, strict=True):
        seen = own.T @ own  # (T, T)
        products = torch.einsum("btm,ts,csm->bc", found.bases, seen, found.bases)
        wanted = torch.einsum("btm,tm->b", found.bases, own.T @ matrix)
        rows.append(_solved(products, wanted[:, None])[:, 0])
    return torch.stack(rows)


def _best_bases(found: SharedBases, weight: Tensor) -> Tensor:  # (B, T, M)
    """One after another, each the best for the others."""
    bases, seen = found.bases.clone(), found.own.mT @ found.own  # (E, T, T)
    toward = found.own.mT @ weight  # (E, T, M)
    for b in range(len(bases)):
        share = found.mixing[:, b]
        others = torch.einsum("eb,btm->etm", found.mixing, bases) - share[:, None, None] * bases[b]
        normal = torch.einsum("e,ets->ts", share.square(), seen)
        wanted = torch.einsum("e,etm->tm", share, toward - seen @ others)
        bases[b] = _solved(normal, wanted)
    return bases


def _solved(normal: Tensor, wanted: Tensor) -> Tensor:
    """The least squares solution; of several the shortest, where directions below the rounding count as not there."""
    return torch.linalg.pinv(normal, hermitian=True) @ wanted
