"""The normal equations of a tensor mixture on calibration inputs, without a Kronecker product and without the weight.

Shape letters (this file): as in `operators.mixt`: I', O' padded sizes, P, Q core input / output size, N num_branches,
d bond, L, R passed-through sizes; s = d^(difference of two branches), M = Q / d^(N-1).

With W' = sum_k E_k(c_k), E_k(c) = I_L ⊗ c ⊗ I_R, and a Gram matrix G (I', I'), the squared output error
tr((W - W') G (W - W')^T) has the normal equations  sum_k E_j^T(E_k(c_k) G) = E_j^T(W G)  for every branch j.

* j = k: E_k^T(E_k(c) G) = c H_k, with H_k (P, P) the partial trace of G over the bonds that branch k passes through.
* j > k: write the bonds on which the two windows differ as α (s values, the first ones of window k) and β (s values,
  the last ones of window j). With T (sP, sP) the partial trace of G over the bonds that both pass through,
      E_j^T(E_k(c) G)[(μ,β), (i,β')] = sum over α, α', i' of c[(α,μ), (α',i')] T[(α',i',β), (α,i,β')],
  one matrix product of (Q/s, sP) with K (sP, sP), which is T with its bonds in another order; K^T leads back.

So one step costs about N^2 s P^2 Q multiplications, much less than I' for each number of the weight. The M rows of the
core-out bond share one matrix, and each is a problem of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from tensormix.operators import MixT
from tensormix.operators.mixt_matching import gather, scatter, window


class MixtNormal:
    """The normal matrix of `op`, its preconditioner, and the gradient, for inputs with Gram matrix `gram` (I, I).

    Unknowns are (B, K): (M, N d^(N-1) P) where every problem can be solved alone; otherwise, with padded outputs or
    windows that share left and right bonds, one problem of all N Q P numbers, and the products go through a matrix of
    the size of the weight.
    """

    def __init__(self, op: MixT, gram: Tensor) -> None:
        self.op, self.num_branches = op, op.num_branches
        passed = op.bond ** (op.num_branches - 1)
        self.in_padded, self.out_padded = op.core_in * passed, op.core_out * passed
        self.gram = F.pad(gram, (0, self.in_padded - op.in_features) * 2)  # (I', I')
        self.own = [self._trace(*sizes) for sizes in op.windows]
        self.factors = [_factor(own) for own in self.own]
        self.separate = self.out_padded == op.out_features and not (op.core_in % passed or op.core_out % passed)
        pairs = combinations(range(op.num_branches), 2) if self.separate else ()
        self.pairs = {(k, j): self._pair(k, j) for k, j in pairs}

    def pack(self, cores: Tensor) -> Tensor:  # (N, Q, P) -> (B, K)
        if not self.separate:
            return cores.reshape(1, -1)
        rows = [part.view(*self._split(k), -1).transpose(0, 1) for k, part in enumerate(cores)]  # (M, left, right, P)
        return torch.stack([row.reshape(row.shape[0], -1) for row in rows], 1).flatten(1)

    def unpack(self, unknowns: Tensor) -> Tensor:  # (B, K) -> (N, Q, P)
        Q, P, N = self.op.core_out, self.op.core_in, self.num_branches
        if not self.separate:
            return unknowns.view(N, Q, P)
        parts = unknowns.view(len(unknowns), N, -1).unbind(1)
        shaped = [p.view(len(p), *self._split(k)[::2], P).transpose(0, 1) for k, p in enumerate(parts)]
        return torch.stack([part.reshape(Q, P) for part in shaped])

    def apply(self, unknowns: Tensor) -> Tensor:  # (B, K) -> (B, K)
        """sum_k E_j^T(E_k(c_k) G) for every j."""
        cores = self.unpack(unknowns)
        if not self.separate:
            return self.pack(self.adjoint(self.image(cores)))
        result = torch.stack([core @ own for core, own in zip(cores, self.own, strict=True)])
        for (k, j), matrix in self.pairs.items():
            s = self.op.bond ** (j - k)
            left, right = _leading(cores[k], s), _trailing(cores[j], s)  # (Q/s, sP) both
            result[j] += _untrailing(left @ matrix, s, cores[j].shape)
            result[k] += _unleading(right @ matrix.T, s, cores[k].shape)
        return self.pack(result)

    def precondition(self, unknowns: Tensor) -> Tensor:  # (B, K) -> (B, K)
        """c_k H_k^-1: the equations of each branch by itself, solved exactly."""
        cores = self.unpack(unknowns)
        solved = [torch.cholesky_solve(c.T, factor).T for c, factor in zip(cores, self.factors, strict=True)]
        return self.pack(torch.stack(solved))

    def image(self, cores: Tensor) -> Tensor:  # (N, Q, P) -> (O', I')
        """sum_k E_k(c_k), rows outside the layer zero."""
        dense = cores.new_zeros(self.out_padded, self.in_padded)
        scatter(dense, cores, self.op.windows)
        dense[self.op.out_features :] = 0
        return dense

    def adjoint(self, weight: Tensor) -> Tensor:  # (O', I') -> (N, Q, P)
        """E_k^T(weight G) for every k; rows outside the layer must be zero."""
        return self._gather(weight @ self.gram)

    def gradient(self, residual: Tensor) -> tuple[Tensor, float]:  # (O', I') -> (B, K)
        """E_k^T(residual G) for every k, and tr(residual G residual^T). Uses up `residual`."""
        error = 0.0
        for rows in residual.split(512):  # a piece at a time, so that only one matrix of this size is needed
            product = rows @ self.gram
            error += float((product * rows).sum(dtype=torch.float64))
            rows.copy_(product)
        return self.pack(self._gather(residual)), error

    def _gather(self, dense: Tensor) -> Tensor:  # (O', I') -> (N, Q, P)
        parts = dense.new_empty(self.num_branches, self.op.core_out, self.op.core_in)
        return gather(parts, dense, self.op.windows)

    def _trace(self, left: int, right: int) -> Tensor:  # (I'/(LR), I'/(LR))
        return window(self.gram, left, right).sum((-2, -1))

    def _pair(self, k: int, j: int) -> Tensor:  # (sP, sP)
        s = self.op.bond ** (j - k)
        common = self._trace(self.op.windows[k][0], self.op.windows[j][1])  # over what both pass through
        i = self.op.core_in // s
        bonds = common.view(s, i, s, s, i, s)  # [α', i', β, α, i, β']
        return bonds.permute(3, 0, 1, 2, 4, 5).reshape(s * s * i, s * s * i)  # [(α, α', i'), (β, i, β')]

    def _split(self, k: int) -> tuple[int, int, int]:
        """The output bonds of core k: how many values lie left of the core bond, on it, and right of it."""
        left, right = self.op.bond ** (self.num_branches - 1 - k), self.op.bond**k
        return left, self.op.core_out // (left * right), right


def _leading(core: Tensor, s: int) -> Tensor:  # (Q, P) -> (Q/s, sP)
    """[(α,μ), (α',i')] -> [μ, (α,α',i')]."""
    return core.view(s, core.shape[0] // s, -1).transpose(0, 1).reshape(core.shape[0] // s, -1)


def _unleading(rows: Tensor, s: int, shape: Sequence[int]) -> Tensor:  # (Q/s, sP) -> (Q, P)
    return rows.view(len(rows), s, -1).transpose(0, 1).reshape(*shape)


def _trailing(core: Tensor, s: int) -> Tensor:  # (Q, P) -> (Q/s, sP)
    """[(μ,β), (i,β')] -> [μ, (β,i,β')]."""
    return core.view(core.shape[0] // s, -1)


def _untrailing(rows: Tensor, s: int, shape: Sequence[int]) -> Tensor:  # (Q/s, sP) -> (Q, P)
    return rows.view(*shape)


def _factor(trace: Tensor) -> Tensor:  # (P, P)
    """The Cholesky factor of a partial trace, a thousandth of its mean eigenvalue added.

    This shapes the preconditioner alone. It costs no steps, and where the inputs leave a choice it keeps the cores
    near their start, because the directions that are hardly seen are then not taken for cheap.
    """
    wide = trace.double()
    ridge = 1e-3 * wide.diagonal().mean()
    return torch.linalg.cholesky(wide + ridge * torch.eye(len(wide)).to(wide)).to(trace)
