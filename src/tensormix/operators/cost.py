"""What an operator, or any other part of a model, costs; and how bits are counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    """The four costs that a budget may be of, each under the name that a recipe has for it.

    Attributes:
        parameters: stored numbers; those that are stored as small integers count too.
        bits: of all tensors that are saved: integers, scales and permutations too.
        macs: multiply-accumulates for one token.
        bytes_per_token: of the tensors that are read for one token: of experts, only of those that it visits.
    """

    parameters: int
    bits: int
    macs: int
    bytes_per_token: int

    def visiting(self, experts: int) -> Cost:
        """Of a stack, whose own cost is that of a token at one expert: of a token that visits so many."""
        return self._replace(macs=experts * self.macs, bytes_per_token=experts * self.bytes_per_token)


def bits_of(state: Mapping[str, Tensor]) -> int:
    """Bits of all tensors of a state, on any device (meta too). Tensors that share their memory count once."""
    return sum({_memory(tensor): 8 * tensor.numel() * tensor.element_size() for tensor in state.values()}.values())


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
