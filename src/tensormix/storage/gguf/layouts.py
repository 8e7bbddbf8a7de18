"""What llama.cpp's converter changes in a tensor beside its dtype, undone: back to what transformers holds.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """The attention of a model in numbers, which layouts depend on."""

    queries: int
    keys: int


Layout = Callable[[Tensor, Heads], Tensor]


def query_rows(tensor: Tensor, heads: Heads) -> Tensor:
    """Rotary pairs that lie side by side, in halves again."""
    return _halves(tensor, heads.queries)


def key_rows(tensor: Tensor, heads: Heads) -> Tensor:
    """As `query_rows`, for the heads of keys."""
    return _halves(tensor, heads.keys)


def _halves(tensor: Tensor, num_heads: int) -> Tensor:  # (O, I) or (O,)
    pairs = tensor.reshape(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def norm_around_zero(tensor: Tensor, heads: Heads) -> Tensor:
    """The gain of a norm that multiplies by one more than what it holds."""
    return tensor - 1


def transposed(tensor: Tensor, heads: Heads) -> Tensor:  # (O, I) -> (I, O)
    """Of modules that hold their weight as (in, out)."""
    return tensor.t()


def one_row(tensor: Tensor, heads: Heads) -> Tensor:  # (I,) -> (1, I)
    """A matrix of one row, whose only row was stored."""
    return tensor.reshape(1, -1)


def heads_of_thirds(tensor: Tensor, heads: Heads) -> Tensor:
    """All queries, keys and values one after the other, head by head again (BLOOM)."""
    rest = tensor.shape[1:]
    return tensor.reshape(3, heads.queries, -1, *rest).swapaxes(0, 1).reshape(tensor.shape)


def groups_of_queries(tensor: Tensor, heads: Heads) -> Tensor:
    """The same where a group of queries comes with its one key and value (Falcon)."""
    rest, size = tensor.shape[1:], tensor.shape[0] // (heads.queries + 2 * heads.keys)
    queries, keys, values = tensor.reshape(-1, size, *rest).split([heads.queries, heads.keys, heads.keys])
    groups = queries.reshape(heads.keys, -1, size, *rest)
    return torch.cat([groups, keys.unsqueeze(1), values.unsqueeze(1)], dim=1).reshape(tensor.shape)


def log_of_negative(tensor: Tensor, heads: Heads) -> Tensor:
    """The logarithm of a decay that was stored as what it stands for."""
    return torch.log(-tensor)


def one_channel(tensor: Tensor, heads: Heads) -> Tensor:  # (O, I) -> (O, 1, I)
    """A convolution by channel, whose kernels were stored as rows."""
    return tensor.reshape(tensor.shape[0], 1, -1)


# Those that change the shape: what it becomes.
SHAPES: dict[Layout, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    transposed: lambda shape: shape[::-1],
    one_row: lambda shape: (1, shape[-1]),
    one_channel: lambda shape: (shape[0], 1, shape[-1]),
}
# Those that a bias has as well as its weight.
OF_BIASES = (query_rows, key_rows, heads_of_thirds, groups_of_queries)
