"""The product on a GPU, in Triton: all branches in one kernel, y written once, sums in fp32.

A tile of y holds every value of the outer bonds for a few values of the core bond: (BN, S, BC, S) with S = d^(K-1)
values on each side. In these terms branch k is a matrix product of (BN L R, S c_in) by (S c_in, S BC), and all branches
of a tile want the same part of x, which therefore comes from memory once and from the cache again.
Up to `FEW` tokens there are too few tiles to fill a GPU and reading the cores is all that counts: then each branch
has tiles of its own, reads its core once, and the K partial results are added afterwards.

Letters of this file beside the folder's:
  c_in, c_out core bond: P = S c_in, Q = S c_out     BN, BC, BK tile sizes of tokens, c_out, c_in
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormix.kernels.mixt import reference

FEW = 16  # tokens up to which the cores are the cost
WIDTH = 64  # S BC and S BK: columns and depth of a tile's products


def fits(cores: Sequence[Tensor], bond: int) -> bool:
    """Whether the kernel can take these cores: windows that share no bonds, tile sides that are powers of two."""
    Q, P = cores[0].shape
    S = bond ** (len(cores) - 1)
    alike = len({(core.stride(), core.dtype) for core in cores}) == 1
    small = S <= WIDTH and S & (S - 1) == 0 and P % S == 0 and Q % S == 0
    return alike and small and cores[0].dtype != torch.float64


def mixt(x: Tensor, cores: Sequence[Tensor], bond: int, out_features: int) -> Tensor:  # (N, I), K x (Q, P) -> (N, O)
    N, I = x.shape
    if N == 0 or not fits(cores, bond):
        return reference.mixt(x, cores, bond, out_features).contiguous()
    (Q, P), K = cores[0].shape, len(cores)
    S = bond ** (K - 1)
    few = N <= FEW
    x = x.contiguous()
    y = x.new_empty(K, N, Q * S, dtype=torch.float32) if few else x.new_empty(N, out_features)
    BN, BC, BK = (max(16 // S, triton.next_power_of_2(N)) if few else 16), max(1, WIDTH // S), max(1, WIDTH // S)
    if few:
        BC = max(1, 16 // S)  # more, smaller tiles: every multiprocessor gets some
    grid = (triton.cdiv(N, BN), triton.cdiv(Q // S, BC), K if few else 1)
    sizes = (N, I, y.shape[-1], P // S, Q // S, *cores[0].stride())
    _mixt[grid](x, tuple(cores), y, *sizes, bond, K, S, BN, BC, BK, few)
    return (y.sum(0)[:, :out_features] / K).to(x.dtype) if few else y


@triton.jit
def _mixt(
    x,  # (N, I)
    cores,  # K x (Q, P)
    y,  # (N, O), or (K, N, O') if SPLIT
    N,
    I,
    O,
    c_in,
    c_out,
    stride_q,
    stride_p,
    D: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BN, S * BC * S), dtype=tl.float32)
    for k in tl.static_range(K):
        if not SPLIT or tl.program_id(2) == k:
            L: tl.constexpr = D**k
            R: tl.constexpr = S // L
            part = _branch(x, cores[k], n, c, N, I, c_in, c_out, stride_q, stride_p, L, R, S, BN, BC, BK)
            part = tl.reshape(part, (BN, L, R, R, BC, L))  # token, passed left and right, then the window's bonds
            total += tl.reshape(tl.permute(part, (0, 1, 3, 4, 5, 2)), (BN, S * BC * S))
    column = tl.arange(0, S * BC * S)
    core_bond = tl.program_id(1) * BC + column // S % BC
    o = (column // (S * BC) * c_out + core_bond) * S + column % S
    inside = (n < N)[:, None] & ((core_bond < c_out) & (o < O))[None, :]
    if SPLIT:
        tl.store(y + (tl.program_id(2) * N + n)[:, None] * O + o[None, :], total, inside)
    else:
        tl.store(y + n[:, None] * O + o[None, :], (total / K).to(y.dtype.element_ty), inside)


@triton.jit
def _branch(
    x,
    core,  # (Q, P)
    n,  # (BN,)
    c,  # (BC,)
    N,
    I,
    c_in,
    c_out,
    stride_q,
    stride_p,
    L: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):  # -> (BN L R, R BC L)
    row = tl.arange(0, BN * S)  # (n, passed left, passed right)
    token = tl.program_id(0) * BN + row // S
    left, right = row // R % L, row % R
    column = tl.arange(0, S * BC)  # (left bonds of the window: R values, core bond, right bonds: L values)
    out_bond = tl.program_id(1) * BC + column // L % BC
    q = (column // (BC * L) * c_out + out_bond) * L + column % L
    depth = tl.arange(0, S * BK)
    part = tl.zeros((BN * S, S * BC), dtype=tl.float32)
    for start in range(0, c_in, BK):
        bond = start + depth // L % BK
        window_left, window_right = depth // (BK * L), depth % L
        i = ((left * R)[:, None] + window_left[None, :]) * c_in + bond[None, :]
        i = i * S + (window_right * R)[None, :] + right[:, None]
        rows = tl.load(x + token[:, None] * I + i, (token < N)[:, None] & (bond < c_in)[None, :] & (i < I), 0.0)
        p = (window_left * c_in + bond) * L + window_right
        there = (bond < c_in)[:, None] & (out_bond < c_out)[None, :]
        part += tl.dot(
            rows, tl.load(core + p[:, None] * stride_p + q[None, :] * stride_q, there, 0.0), input_precision="ieee"
        )
    return part
