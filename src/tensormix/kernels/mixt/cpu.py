"""The products on a CPU: every branch is a matrix product on views, so that only x and y are ever rearranged.

Many tokens are taken in blocks, features first: in (B, I', M) the bonds on the right of a window lie beside the tokens,
and branch k is `core_k @ (B L, P, R M)`, for every k from the same buffer into the same buffer. For a few tokens the
product of (N L R, P) rows is faster, whose rearranging costs little there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tensormix.kernels.mixt.reference import windows

FEW = 12  # tokens up to which rows win
M = 64  # tokens of a block: its features fit the second cache of a core
B = 2  # blocks taken at a time, so that two cores copy side by side
COLUMNS = 1024  # of y that are written at a time: their part of a block stays in the second cache


def mixt(x: Tensor, cores: Sequence[Tensor], bond: int, out_features: int) -> Tensor:  # (N, I), K x (Q, P) -> (N, O)
    y = x.new_empty(x.shape[0], out_features)
    if x.shape[0] <= FEW:
        _by_rows(x, cores, bond, y)
        return y
    Q, P = cores[0].shape
    passed, K = bond ** (len(cores) - 1), len(cores)
    source, target = _Blocks(x, P * passed), _Blocks(y, Q * passed)
    pieces = list(_pieces(x.shape[0]))
    for size in dict.fromkeys(piece.stop - piece.start for piece in pieces):
        given, made = source.blocks(size), target.blocks(size)
        products = []
        for core, (L, R) in zip(cores, windows(K, bond), strict=True):
            out = _batch(made, L, Q, R)
            products.append((out, core.expand(out.shape[0], Q, P), _batch(given, L, P, R)))
        for piece in pieces:
            if piece.stop - piece.start == size:
                source.read(piece)
                for k, (out, core, part) in enumerate(products):
                    torch.baddbmm(out, core, part, beta=int(k > 0), alpha=1 / K, out=out)
                target.write(piece)
    return y


def mixt_cores(
    dy: Tensor, x: Tensor, core_sizes: Sequence[int], num_branches: int, bond: int
) -> Tensor:  # (N, O), (N, I), (Q, P) -> (K, Q, P)
    Q, P = core_sizes
    passed = bond ** (num_branches - 1)
    grads = x.new_zeros(num_branches, Q, P)
    ins, outs = _Blocks(x, P * passed), _Blocks(dy, Q * passed)
    for tokens in _pieces(x.shape[0]):
        right, left = ins.read(tokens), outs.read(tokens)
        for grad, (L, R) in zip(grads, windows(num_branches, bond), strict=True):
            pairs = _batch(left, L, Q, R), _batch(right, L, P, R).transpose(1, 2)
            torch.addbmm(grad, *pairs, alpha=1 / num_branches, out=grad)
    return grads


class _Blocks:
    """Blocks of the tokens of `rows` (N, I), features first and filled with zeros to I'; one buffer for all."""

    def __init__(self, rows: Tensor, padded: int) -> None:
        self.rows, self.padded = rows, padded
        self.buffer = rows.new_empty(padded * min(len(rows), B * M))

    def blocks(self, num_tokens: int) -> Tensor:  # (B, I', M), or (1, I', rest)
        num_blocks = -(-num_tokens // M)
        return self.buffer[: num_tokens * self.padded].view(num_blocks, self.padded, -1)

    def read(self, tokens: slice) -> Tensor:  # (B, I', M)
        blocks, features = self.blocks(tokens.stop - tokens.start), self.rows.shape[1]
        blocks[:, :features].copy_(self._rows(tokens, blocks).transpose(1, 2))
        if features < self.padded:
            blocks[:, features:].zero_()  # a piece of another size has them elsewhere in the buffer
        return blocks

    def write(self, tokens: slice) -> None:
        blocks, features = self.blocks(tokens.stop - tokens.start), self.rows.shape[1]
        rows = self._rows(tokens, blocks)
        for start in range(0, features, COLUMNS):
            columns = slice(start, min(start + COLUMNS, features))
            rows[:, :, columns].copy_(blocks[:, columns].transpose(1, 2))

    def _rows(self, tokens: slice, blocks: Tensor) -> Tensor:  # (B, M, I)
        return self.rows[tokens].unflatten(0, (blocks.shape[0], blocks.shape[2]))


def _batch(blocks: Tensor, L: int, size: int, R: int) -> Tensor:  # (B, L size R, M) -> (B L, size, R M), a view
    return blocks.view(blocks.shape[0] * L, size, R * blocks.shape[2])


def _pieces(num_tokens: int) -> Iterator[slice]:
    """B blocks at a time, then what is left: one whole block, then less than one."""
    start = 0
    for size in (B * M, M):
        while num_tokens - start >= size:
            yield slice(start, start + size)
            start += size
    if start < num_tokens:
        yield slice(start, num_tokens)


def _by_rows(x: Tensor, cores: Sequence[Tensor], bond: int, y: Tensor) -> None:  # (N, I), K x (Q, P), out (N, O)
    Q, P = cores[0].shape
    N, K = x.shape[0], len(cores)
    passed = bond ** (K - 1)
    x = F.pad(x, (0, P * passed - x.shape[1])) if x.shape[1] < P * passed else x.contiguous()
    whole = y if y.shape[1] == Q * passed else y.new_empty(N, Q * passed)
    *others, last = cores  # which passes nothing through on its right: its inputs and outputs lie in order
    products = whole.view(-1, Q)
    torch.addmm(products, x.view(-1, P), last.t(), beta=0, alpha=1 / K, out=products)
    for core, (L, R) in zip(others, windows(K, bond), strict=False):
        rows = x.view(N, L, P, R).transpose(2, 3).contiguous().view(-1, P)  # as a strided view the product is slower
        part = torch.mm(rows, core.t()).view(N, L, R, Q).transpose(2, 3)
        whole.view(N, L, Q, R).add_(part, alpha=1 / K)
    if whole is not y:
        y.copy_(whole[:, : y.shape[1]])
