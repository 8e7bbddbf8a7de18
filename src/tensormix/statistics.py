"""What calibration can measure at a site. Each class sees every batch of inputs once; the batches may be cut anywhere.

Shape letters: ... leading batch axes, N tokens, I in_features, K = min(N, I).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

_TILE = 128  # rows
_MIXER = -0x61C8864680B583EB  # odd, 2^64 over the golden ratio: each bit of a product's top depends on all bits below


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, without a mask of the size of the tensor."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


class Statistic(ABC):
    """Something that is gathered over tokens, computed and held in one dtype whatever that of the inputs.

    `stream` says which inputs it wants where a walk has several: "dense", those of the model before compression,
    "propagated", those that passed through the compressed blocks, or "walk", whichever of them the walk is set to.

    Raises:
        ValueError: `dtype` is neither float64 nor float32.
    """

    stream: ClassVar[Literal["walk", "dense", "propagated"]] = "walk"
    _held: Tensor

    def __init__(
        self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(
                f"{type(self).__name__}: dtype must be torch.float64 or torch.float32, got {dtype}; "
                "less than float32 loses small numbers beside large ones"
            )
        self.in_features, self.num_tokens = in_features, 0
        self._held = torch.zeros(self.shape_held(in_features), dtype=dtype, device=device)

    @classmethod
    @abstractmethod
    def shape_held(cls, in_features: int) -> tuple[int, ...]:
        """The shape of the one tensor that is held from the start."""

    @classmethod
    def bytes_needed(cls, in_features: int, dtype: torch.dtype = torch.float64) -> int:
        """What the statistic of one site holds.

        Not counted is what an update needs for a moment: the batch in `dtype`, and as much again for the QR factor.
        """
        return prod(cls.shape_held(in_features)) * dtype.itemsize

    def update(self, x: Tensor) -> None:  # (..., I)
        """Add the tokens of one batch of inputs.

        Raises:
            ValueError: the last axis of `x` is not in_features.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"{type(self).__name__}: inputs must be (..., {self.in_features}), got shape {tuple(x.shape)}"
            )
        tokens = x.detach().reshape(-1, self.in_features).to(self._held)  # (N, I)
        self._add(tokens)
        self.num_tokens += tokens.shape[0]

    def merge(self, other: Self) -> None:
        """Add what `other` saw, as if its batches had come here; `other` is left as it is.

        Raises:
            ValueError: `other` is of another class, in_features or dtype.
        """
        dtypes = {self._held.dtype, other._held.dtype}
        if type(other) is not type(self) or other.in_features != self.in_features or len(dtypes) > 1:
            raise ValueError(f"only equal kinds can be merged: this is {self!r}, the other is {other!r}")
        self._absorb(other)
        self.num_tokens += other.num_tokens

    def share(self, other: Self) -> None:
        """Hold what `other` holds, which saw the same tokens, in the same memory. Call `part` before either is updated.

        `other` is of the same class, in_features and dtype.
        """
        vars(self).update(vars(other))

    def part(self) -> None:
        """Have memory of its own again, after `share`."""
        self._held = self._held.clone()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features}, {self._held.dtype})"

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no infinite value came in, and nothing overflowed."""
        return is_finite(self._held)

    @abstractmethod
    def _add(self, tokens: Tensor) -> None:  # (N, I), in the dtype and on the device of what is held
        """Add the tokens to what is held."""

    @abstractmethod
    def _absorb(self, other: Self) -> None:
        """Add what another one of this class holds."""

    def _check_tokens(self) -> None:
        if self.num_tokens == 0:
            raise ValueError(f"{type(self).__name__}: no tokens were seen; did calibration run through this site?")


class TokenSum(Statistic):
    """A sum over tokens."""

    @property
    def sum(self) -> Tensor:
        return self._held

    @property
    def mean(self) -> Tensor:
        """The sum divided by the number of tokens.

        Raises:
            ValueError: no tokens were seen.
        """
        self._check_tokens()
        return self.sum / self.num_tokens

    def _absorb(self, other: Self) -> None:
        self._held += other._held.to(self._held)


class InputMean(TokenSum):
    """sum over tokens of x; (I,)."""

    @classmethod
    def shape_held(cls, in_features: int) -> tuple[int, ...]:
        return (in_features,)

    def _add(self, tokens: Tensor) -> None:  # (N, I)
        self._held += tokens.sum(0)


class InputNorms(TokenSum):
    """sum over tokens of x^2, feature by feature; (I,)."""

    @classmethod
    def shape_held(cls, in_features: int) -> tuple[int, ...]:
        return (in_features,)

    @property
    def rms(self) -> Tensor:  # (I,)
        """Root mean square of each feature.

        Raises:
            ValueError: no tokens were seen.
        """
        return self.mean.sqrt()

    def _add(self, tokens: Tensor) -> None:  # (N, I)
        self._held += tokens.square().sum(0)


class InputMagnitudes(TokenSum):
    """sum over tokens of |x|, feature by feature; (I,)."""

    @classmethod
    def shape_held(cls, in_features: int) -> tuple[int, ...]:
        return (in_features,)

    def _add(self, tokens: Tensor) -> None:  # (N, I)
        self._held += tokens.abs().sum(0)


class Gram(TokenSum):
    """sum over tokens of x x^T; (I, I).

    It is symmetric, so only tiles on and below the diagonal are multiplied: about half of the work. The rest is copied
    from them when the sum is read.
    """

    @classmethod
    def shape_held(cls, in_features: int) -> tuple[int, ...]:
        return (in_features, in_features)

    @property
    def sum(self) -> Tensor:
        for start, stop in self._tiles():
            tile = self._held[start:stop, start:stop]
            tile.copy_(tile.tril() + tile.tril(-1).T)
            self._held[:start, start:stop] = self._held[start:stop, :start].T
        return self._held

    def _add(self, tokens: Tensor) -> None:  # (N, I)
        for start, stop in self._tiles():
            self._held[start:stop, :stop].addmm_(tokens[:, start:stop].T, tokens[:, :stop])

    def _tiles(self) -> Iterator[tuple[int, int]]:
        """First row and end of each; of narrower ones the products are slow."""
        rows = max(_TILE, -(-self.in_features // 8))
        return ((start, min(start + rows, self.in_features)) for start in range(0, self.in_features, rows))


class DenseGram(Gram):
    """Gram of the inputs that the site gets in the model before compression."""

    stream = "dense"


class PropagatedGram(Gram):
    """Gram of the inputs that passed through the compressed blocks."""

    stream = "propagated"


class HeldOutGram(Gram):
    """Gram of an eighth of the tokens: those that a fit is judged by. What `Gram` sees beside them is its difference.

    Which tokens is read off their numbers, so that it does not matter how batches are cut.
    """

    def _add(self, tokens: Tensor) -> None:  # (N, I)
        bits = tokens.view({8: torch.int64, 4: torch.int32}[tokens.element_size()]).long().sum(1)
        super()._add(tokens[(bits * _MIXER >> 61) & 7 == 0])


class QRFactor(Statistic):
    """R of the QR factorisation of all inputs, R^T R = sum over tokens of x x^T; (K, I).

    The sequential TSQR of arXiv 0808.2664: R <- R of qr([R; tokens]). x x^T is never formed, so singular values of the
    inputs survive down to the rounding of the dtype, where a Gram matrix loses them below its square root. Tokens are
    buffered, so that there is one QR for as many tokens as there are features, and at least 256.
    """

    def __init__(
        self, in_features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__(in_features, device, dtype)
        self._filled = 0  # rows of what is held that are in use: R, then the buffered tokens

    @classmethod
    def shape_held(cls, in_features: int) -> tuple[int, ...]:
        return (in_features + max(in_features, 256), in_features)

    @property
    def factor(self) -> Tensor:  # (K, I)
        """R, upper triangular with a diagonal that is not negative: unique where the inputs have full rank.

        Raises:
            ValueError: no tokens were seen.
        """
        self._check_tokens()
        factor = self._factorise()
        return torch.where(factor.diagonal() < 0, -1, 1)[:, None] * factor

    def _factorise(self) -> Tensor:  # (K, I)
        return torch.linalg.qr(self._held[: self._filled], mode="r").R

    def _add(self, tokens: Tensor) -> None:  # (N, I)
        while tokens.shape[0] > 0:
            if self._filled == self._held.shape[0]:
                self._keep(self._factorise())
            fitting, tokens = tokens.tensor_split([self._held.shape[0] - self._filled])
            self._held[self._filled : self._filled + len(fitting)] = fitting
            self._filled += len(fitting)

    def _keep(self, factor: Tensor) -> None:  # (K, I)
        self._held[: len(factor)] = factor
        self._filled = len(factor)

    def _absorb(self, other: Self) -> None:
        self._add(other._factorise().to(self._held))


STATISTICS: dict[str, type[Statistic]] = {
    kind.__name__: kind
    for kind in (InputMean, InputNorms, InputMagnitudes, Gram, DenseGram, PropagatedGram, HeldOutGram, QRFactor)
}
