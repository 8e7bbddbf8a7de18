"""The products on a CPU: every branch is a matrix product on views, and little of x and y is ever rearranged.

The last branch finds its inputs in order in the rows of x and adds to the rows of y. Where there are tokens enough, the
last two branches become one such core first, of d P inputs and d Q outputs, which costs the same arithmetic. All others
pass the last bonds through: a unit of u features, as many as those bonds have values, always moves together, as one
word of up to 16 bytes. They take tiles of blocks of M tokens, units first: in (B, I'/u, M, u) the bonds on the right of
a window lie beside the tokens, and branch k is `core_k @ (B L, P, R M)`, for every k from one tile into one tile.
For a few tokens reading the cores is the cost, and each branch takes rearranged rows through its core, part by part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tensormix.kernels.mixt.reference import windows

FEW = 8  # tokens up to which each branch takes rows of its own
LARGE = 2**20  # bytes of a core in float32 above which few tokens take it part by part, each near enough to be kept
OUTPUTS = 32  # of such a part
MANY = 128  # tokens from which two branches are worth joining, for each byte of a number
B = 4  # blocks of a tile of a product: two cores take them side by side
BLOCK = 128  # bytes that the tokens of such a block take for one feature: its features fit the second cache of a core
DEPTH = 512  # the same of the one block of a tile of the gradients, which sum over its tokens
CHUNK = 512  # tokens taken at a time where x or y must be copied, because they are padded or x is not contiguous
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by their bytes


def mixt(x: Tensor, cores: Sequence[Tensor], bond: int, out_features: int) -> Tensor:  # (N, I), K x (Q, P) -> (N, O)
    y = x.new_empty(x.shape[0], out_features)
    if x.shape[0] <= FEW:
        _by_rows(x, cores, bond, y)
        return y
    (Q, P), K = cores[0].shape, len(cores)
    passed = bond ** (K - 1)
    joined = 2 if K > 1 and x.shape[0] >= MANY * x.element_size() else 1
    last = cores[-1] if joined == 1 else _join(cores[-2], cores[-1], bond)
    for tokens in _chunks(x, P * passed, whole=out_features == Q * passed):
        rows, made = _padded(x[tokens], P * passed), y[tokens]
        sums = made if out_features == Q * passed else y.new_empty(len(rows), Q * passed)
        if joined < K:
            _through_tiles(rows, cores, bond, joined, sums)
        products, inputs = sums.view(-1, last.shape[0]), rows.view(-1, last.shape[1])
        torch.addmm(products, inputs, last.t(), beta=int(joined < K), alpha=1 / K, out=products)
        if sums is not made:
            made.copy_(sums[:, :out_features])
    return y


def mixt_cores(
    dy: Tensor, x: Tensor, core_sizes: Sequence[int], num_branches: int, bond: int
) -> Tensor:  # (N, O), (N, I), (Q, P) -> (K, Q, P)
    (Q, P), K = core_sizes, num_branches
    passed = bond ** (K - 1)
    # what is summed over many tokens is summed in at least float32
    grads = x.new_zeros(K, Q, P, dtype=torch.promote_types(x.dtype, torch.float32))
    for tokens in _chunks(x, P * passed, whole=dy.is_contiguous() and dy.shape[1] == Q * passed):
        left, right = _padded(dy[tokens], Q * passed), _padded(x[tokens], P * passed)
        _add_product(grads[-1], left.view(-1, Q).t(), right.view(-1, P), 1 / K)
        if K > 1:
            _add_traces(left, right, bond, grads)
    return grads.to(x.dtype)


def _join(left: Tensor, right: Tensor, bond: int) -> Tensor:  # (Q, P), (Q, P) -> (d Q, d P)
    """The last two branches as one: core ⊗ I_d + I_d ⊗ core."""
    Q, P = left.shape
    both = left.new_zeros(bond * Q, bond * P)
    both.view(Q, bond, P, bond).diagonal(dim1=1, dim2=3).copy_(left[..., None].expand(Q, P, bond))
    both.view(bond, Q, bond, P).diagonal(dim1=0, dim2=2).add_(right[..., None])
    return both


def _chunks(x: Tensor, padded: int, *, whole: bool) -> Iterator[slice]:
    """All tokens at once, or `CHUNK` at a time where they are copied."""
    whole = whole and x.is_contiguous() and x.shape[1] == padded
    step = max(1, x.shape[0]) if whole else CHUNK
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _padded(rows: Tensor, padded: int) -> Tensor:  # (n, I) -> (n, I')
    return rows.contiguous() if rows.shape[1] == padded else F.pad(rows, (0, padded - rows.shape[1]))


def _through_tiles(rows: Tensor, cores: Sequence[Tensor], bond: int, joined: int, sums: Tensor) -> None:
    """The branches that are not `joined`: (n, I'), K x (Q, P), out (n, O')."""
    (Q, P), K, block = cores[0].shape, len(cores), max(1, BLOCK // rows.element_size())
    source, target = (_Tiles(one, bond**joined, B, block) for one in (rows, sums))
    tiled = [core.contiguous() if core.element_size() < 4 else core for core in cores[:-joined]]  # oneDNN needs it
    pieces = list(_pieces(rows.shape[0], B * block, block))
    for size in dict.fromkeys(piece.stop - piece.start for piece in pieces):
        given, made = source.tile(size), target.tile(size)
        products = []
        for core, (L, _) in zip(tiled, windows(K, bond), strict=False):
            out = _batch(made, L, Q)
            products.append((out, core.expand(out.shape[0], Q, P), _batch(given, L, P)))
        for piece in pieces:
            if piece.stop - piece.start == size:
                source.read(piece)
                for k, (out, core, part) in enumerate(products):
                    torch.baddbmm(out, core, part, beta=int(k > 0), alpha=1 / K, out=out)
                target.write(piece)


def _add_traces(left: Tensor, right: Tensor, bond: int, grads: Tensor) -> None:
    """The gradients of all branches but the last: (n, O'), (n, I'), sums (K, Q, P)."""
    (K, Q, P), block = grads.shape, max(1, DEPTH // left.element_size())
    outs, ins = (_Tiles(one, bond, 1, block) for one in (left, right))
    for tokens in _pieces(left.shape[0], block):
        made, given = outs.read(tokens), ins.read(tokens)
        for grad, (L, _) in zip(grads[:-1], windows(K, bond), strict=False):
            for one, other in zip(_batch(made, L, Q), _batch(given, L, P), strict=True):
                _add_product(grad, one, other.t(), 1 / K)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:  # (Q, P), (Q, n), (n, P)
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, alpha=scale, out=total)
    else:
        total.add_(left @ right, alpha=scale)


class _Tiles:
    """Tiles of `rows` (n, I'), units first, in one buffer for all: each of at most `num_blocks` blocks of tokens."""

    def __init__(self, rows: Tensor, unit: int, num_blocks: int, block: int) -> None:
        unit_bytes = unit * rows.element_size()
        word = math.gcd(16, unit_bytes, rows.data_ptr(), rows.storage_offset() * rows.element_size())
        self.word, self.features, self.block = WORDS[word], rows.shape[1], block
        self.rows = rows.view(self.word).unflatten(1, (-1, unit_bytes // word))  # (n, I'/u, words of a unit)
        self.buffer = rows.new_empty(min(rows.shape[0], num_blocks * block) * self.features)

    def tile(self, num_tokens: int) -> Tensor:  # (B, I' M), its axes I'/u, M, u
        return self.buffer[: num_tokens * self.features].view(-(-num_tokens // self.block), -1)

    def read(self, tokens: slice) -> Tensor:
        tile, inside, outside = self._words(tokens)
        inside.copy_(outside)
        return tile

    def write(self, tokens: slice) -> None:
        _, inside, outside = self._words(tokens)
        outside.copy_(inside)

    def _words(self, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:  # the tile; (B, M, I'/u, words), twice
        tile, rows = self.tile(tokens.stop - tokens.start), self.rows[tokens]
        rows = rows.unflatten(0, (tile.shape[0], -1))
        return tile, tile.view(self.word).view(rows.transpose(1, 2).shape).transpose(1, 2), rows


def _batch(tile: Tensor, L: int, size: int) -> Tensor:  # (B, L size R M) -> (B L, size, R M), a view
    return tile.view(tile.shape[0] * L, size, -1)


def _pieces(num_tokens: int, *sizes: int) -> Iterator[slice]:
    """As many of the first size as there are, then of the second, then one of what is left."""
    start = 0
    for size in sizes:
        while num_tokens - start >= size:
            yield slice(start, start + size)
            start += size
    if start < num_tokens:
        yield slice(start, num_tokens)


def _by_rows(x: Tensor, cores: Sequence[Tensor], bond: int, y: Tensor) -> None:  # (N, I), K x (Q, P), out (N, O)
    (Q, P), N, K = cores[0].shape, x.shape[0], len(cores)
    passed = bond ** (K - 1)
    x = _padded(x, P * passed)
    whole = y if y.shape[1] == Q * passed else y.new_empty(N, Q * passed)
    parts = math.gcd(Q, max(1, Q // OUTPUTS)) if x.element_size() == 4 and cores[0].nbytes > LARGE else 1
    for core, (L, R) in reversed(list(zip(cores, windows(K, bond), strict=True))):
        if R == 1 and parts == 1:  # its inputs and outputs lie in order
            sums = whole.view(-1, Q)
            torch.addmm(sums, x.view(-1, P), core.t(), beta=0, alpha=1 / K, out=sums)
            continue
        rows = x.view(N * L, P, R).transpose(1, 2).contiguous().view(-1, P)  # as a strided view the product is slower
        if parts == 1:
            made, sums = torch.mm(rows, core.t()).view(N * L, R, Q).transpose(1, 2), whole.view(N * L, Q, R)
        else:  # (parts, N L R, Q / parts)
            made = torch.bmm(rows.expand(parts, -1, P), core.unflatten(0, (parts, -1)).transpose(1, 2))
            made, sums = made.view(parts, N * L, R, -1).permute(1, 0, 3, 2), whole.view(N * L, parts, -1, R)
        if R == 1:
            torch.mul(made, 1 / K, out=sums)
        else:
            sums.add_(made, alpha=1 / K)
    if whole is not y:
        y.copy_(whole[:, : y.shape[1]])
