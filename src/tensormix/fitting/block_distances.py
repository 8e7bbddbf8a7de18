"""How far blocks turn the hidden states that pass through them.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BlockDistances:
    """Between the hidden states that enter a window of blocks and those that leave it, over batches of sequences.

    With c the cosine between the two states of a token, `angle` is the mean of arccos(c) / pi over the tokens that
    count, from 0 to 1 (arXiv 2403.17887, Eq. 9; there the last token of each sequence counts), and `influence` is the
    mean of 1 - c (arXiv 2403.03853, Eq. 1; over all tokens). Both come from the chord between the two directions, so
    that angles far below the rounding of c are right.
    """

    def __init__(self, tokens: str = "all") -> None:
        self.tokens, self.num_tokens = tokens, 0  # "last" of each sequence, or "all"
        self._angles = self._influences = 0.0  # sums over tokens

    def update(self, entering: Tensor, leaving: Tensor) -> None:  # (B, T, D) each
        """Add the tokens of one batch.

        Raises:
            ValueError: a state is NaN, infinite or zero, and so has no direction.
        """
        ends = [state[:, -1:] if self.tokens == "last" else state for state in (entering, leaving)]
        units = []
        for state in ends:
            norms = state.double().norm(dim=-1, keepdim=True)
            if not norms.isfinite().all() or not norms.all():
                raise ValueError("hidden states are NaN, infinite or zero there, and have no direction")
            units.append(state.double() / norms)
        chord, sum_norm = (units[0] - units[1]).norm(dim=-1), (units[0] + units[1]).norm(dim=-1)
        self._angles += float((2 * torch.atan2(chord, sum_norm) / torch.pi).sum())
        self._influences += float((chord.square() / 2).sum())
        self.num_tokens += chord.numel()

    @property
    def angle(self) -> float:  # fraction of pi
        return self._angles / self.num_tokens

    @property
    def influence(self) -> float:  # 0 to 2
        return self._influences / self.num_tokens
