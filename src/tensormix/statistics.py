"""What calibration can measure at a site. Each class sees every input batch once and keeps a sum over tokens.

Products and sums are in fp64 whatever the dtype of the inputs, so that the batches may be cut anywhere.
Shape letters: ... leading batch axes, N tokens, I in_features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Statistic(ABC):
    """A sum over tokens of something of the shape `sum`."""

    def __init__(self, sum: Tensor) -> None:
        self.sum, self.num_tokens = sum, 0

    def update(self, x: Tensor) -> None:  # (..., I)
        """Add the tokens of one batch of inputs."""
        tokens = x.detach().reshape(-1, x.shape[-1]).to(self.sum)  # (N, I)
        self.add(tokens)
        self.num_tokens += tokens.shape[0]

    @abstractmethod
    def add(self, tokens: Tensor) -> None:  # (N, I), in the dtype and on the device of the sum
        """Add the tokens to the sum."""

    @property
    def mean(self) -> Tensor:
        """The sum divided by the number of tokens.

        Raises:
            ValueError: no tokens were seen.
        """
        if self.num_tokens == 0:
            raise ValueError(f"{type(self).__name__}: no tokens were seen; did calibration run through this site?")
        return self.sum / self.num_tokens


class InputMean(Statistic):
    """sum over tokens of x, in fp64; (I,)."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(torch.zeros(in_features, dtype=torch.float64, device=device))

    def add(self, tokens: Tensor) -> None:  # (N, I)
        self.sum += tokens.sum(0)


class Gram(Statistic):
    """sum over tokens of x x^T, in fp64; (I, I)."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(torch.zeros(in_features, in_features, dtype=torch.float64, device=device))

    def add(self, tokens: Tensor) -> None:  # (N, I)
        self.sum.addmm_(tokens.T, tokens)


STATISTICS: dict[str, type] = {"InputMean": InputMean, "Gram": Gram}
