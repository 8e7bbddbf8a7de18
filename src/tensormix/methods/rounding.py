"""What the methods share that store small integers.

Shape letters: O out_features, I in_features, K inputs of what is rounded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from tensormix.fitting.whitening import check_inputs
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import Dense, Quantized, StructuredLinear
from tensormix.statistics import Gram, HeldOutGram

if TYPE_CHECKING:
    # The union of all linear methods but these. `tensormix.methods` resolves the name when its table is complete.
    AnyLinearMethod = LinearMethod


class IntegerGrid(LinearMethod):
    """Which numbers integers of a few bits can stand for: (code - zero) * scale, in groups that share both."""

    size = "bits"
    largest = 8

    bits: Literal[2, 3, 4, 8]  # of one integer
    granularity: Literal["tensor", "channel", "group"] = "group"  # what shares a scale: a matrix, a row, part of one
    group: int = Field(default=128, ge=1)  # how many neighbours in a row share a scale
    symmetric: bool = True  # no zero points
    zero_bits: Literal[8] | None = None  # of a zero point, so that it may lie between codes; None: as `bits`

    @field_validator("group")
    @classmethod
    def _with_groups_only(cls, group: int, info: ValidationInfo) -> int:
        granularity = info.data.get("granularity", "group")
        if granularity != "group" and group != cls.model_fields["group"].default:
            raise ValueError(
                f"{group} has no meaning with granularity {granularity!r}; leave it out, or write granularity 'group'"
            )
        return group

    @model_validator(mode="after")
    def _zeros_of_their_own(self) -> Self:
        if self.zero_bits is not None and self.symmetric:
            raise ValueError(f"zero_bits {self.zero_bits} has no meaning with symmetric true, which has no zero points")
        return self

    @property
    def is_differentiable(self) -> bool:
        return False

    @property
    def rounding_sizes(self) -> dict[str, Any]:
        """What `Quantized` calls them."""
        group = self.group if self.granularity == "group" else self.granularity
        return {"bits": self.bits, "group": group, "symmetric": self.symmetric, "zero_bits": self.zero_bits}


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration saw of the inputs of a weight."""

    gram: Tensor  # (I, I), fp64, a mean over tokens
    held_out: Tensor  # (I, I), of some of these tokens
    num_tokens: int

    @classmethod
    def of(cls, stats: Statistics, weight: Tensor) -> Seen:
        """On the device of the weight. Raises ValueError if the inputs are zero or not finite."""
        gram, held_out = (stats[kind].mean.to(weight.device).double() for kind in (Gram, HeldOutGram))
        check_inputs(gram)
        return cls(gram, held_out, stats[Gram].num_tokens)

    def through(self, maps: Tensor) -> Seen:  # (K, I)
        """Of what these maps make of the inputs."""
        maps = maps.to(self.gram)
        return Seen(maps @ self.gram @ maps.T, maps @ self.held_out @ maps.T, self.num_tokens)

    def chosen(self, columns: Tensor) -> Seen:  # (K,)
        """Of some of the inputs alone."""
        gram, held_out = (each[columns][:, columns] for each in (self.gram, self.held_out))
        return Seen(gram, held_out, self.num_tokens)


class _NeedsOfInner:
    """Nothing, or what the inner method needs."""

    def __get__(self, method: Rounding | None, _: Any = None) -> tuple[Any, ...]:
        return () if method is None or method.of is None else method.of.needs


class Rounding(IntegerGrid):
    """The weight, or what another method fits to it, as integers of a few bits and scales."""

    needs: ClassVar[Any] = _NeedsOfInner()

    of: AnyLinearMethod | None = None  # whose cores or factors are rounded; without it the weight itself

    def allowed_sizes(self, in_features: int, out_features: int) -> Sequence[Any]:
        """Of `of` the sizes of that method, whose numbers all get these bits; of the weight itself the bits."""
        return (2, 3, 4, 8) if self.of is None else self.of.allowed_sizes(in_features, out_features)

    def sized(self, value: Any) -> Self:
        changed = {"bits": value} if self.of is None else {"of": self.of.sized(value)}
        return self.model_copy(update=changed)

    def fit(self, weight: Tensor, stats: Statistics) -> Quantized:  # (O, I)
        return self.fit_with_facts(weight, stats)[0]

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[Quantized, dict[str, Any]]:  # (O, I)
        inner = Dense.from_dense(weight.detach()) if self.of is None else self.of.fit(weight, stats)
        return self.rounded(inner, weight.detach(), Seen.of(stats, weight) if HeldOutGram in self.needs else None)

    @abstractmethod
    def rounded(
        self, inner: StructuredLinear, weight: Tensor, seen: Seen | None
    ) -> tuple[Quantized, dict[str, Any]]:  # (O, I)
        """`inner`, which was fitted to `weight`, in integers; and what a row should say about it.

        `seen` is there where the method needs the inputs.
        """

    def empty(self, in_features: int, out_features: int) -> Quantized:
        with torch.device("meta"):
            inner = Dense(in_features, out_features) if self.of is None else self.of.empty(in_features, out_features)
        return self.emptied(inner)

    def emptied(self, inner: StructuredLinear) -> Quantized:
        """`rounded` on meta, of an operator on meta.

        Raises:
            ValueError: the method cannot round this kind.
        """
        with torch.device("meta"):
            op = Quantized(inner=inner, **self.rounding_sizes)
        op.bias = inner.bias
        return op
