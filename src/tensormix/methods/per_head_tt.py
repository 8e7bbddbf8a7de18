"""A tensor train for every head of an attention.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from tensormix.fitting.train_ranks import Modes, train_ranks
from tensormix.methods.base import Heads, JointMethod, Layer, Statistics, Symmetry, about
from tensormix.methods.neurons import unchanged, with_bias
from tensormix.operators import Concat, Dense, StructuredLinear, TensorTrain
from tensormix.operators.tensor_train import mode_factors


class PerHeadTt(JointMethod):
    """The rows of q, k, v and the columns of o head by head, each a tensor train by TT-SVD.

    With `keep` every head gets the largest rank within its own share; 1 leaves the layers as they are. Raises
    ValueError unless exactly one of `keep` and `rank` is given.
    """

    source = "TT-LLM"
    summary = "A tensor train for each head: of the rows of q, k, v and of the columns of o."
    roles = ("q", "k", "v", "o")

    size = "keep"

    name: Literal["per_head_tt"] = "per_head_tt"
    keep: float | None = Field(default=None, gt=0, le=1)  # fraction of the dense numbers
    rank: int | None = Field(default=None, ge=1)  # of every bond, where the sides of the bond allow as much
    modes: int = Field(default=4, ge=1)  # how many pairs of factors

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.keep is None) == (self.rank is None):
            got = "none of them" if self.rank is None else "both"
            raise ValueError(f"{self.name}: takes either keep (a fraction) or rank (of the bonds), got {got}")
        return self

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        return ()  # every head stays in its own bases

    def empty(self, shapes: Mapping[str, tuple[int, int]], heads: Heads | None) -> dict[str, StructuredLinear]:
        with torch.device("meta"):
            if self.keep == 1:
                return {role: Dense(I, O) for role, (O, I) in shapes.items()}
            made: dict[str, StructuredLinear] = {}
            for role, (O, I) in shapes.items():
                number = self._count(role, heads)
                ends = (O, I // number) if role == "o" else (O // number, I)
                sizes = self._sizes(role, *ends)
                parts = [TensorTrain(ends[1], ends[0], **sizes) for _ in range(number)]
                made[role] = Concat(parts=parts, axis="in" if role == "o" else "out")
            return made

    def fit(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], heads: Heads | None
    ) -> dict[str, StructuredLinear]:
        if self.keep == 1:
            return unchanged(layers)
        fitted: dict[str, StructuredLinear] = {}
        for role, layer in layers.items():
            pieces = layer.weight.detach().chunk(self._count(role, heads), dim=1 if role == "o" else 0)
            sizes = self._sizes(role, pieces[0].shape[0], pieces[0].shape[1])
            parts = [TensorTrain.from_dense(piece, **sizes) for piece in pieces]
            fitted[role] = with_bias(Concat(parts=parts, axis="in" if role == "o" else "out"), layer.bias)
        return fitted

    def _count(self, role: str, heads: Heads | None) -> int:
        assert heads is not None
        return heads.num_kv_heads if role in "kv" else heads.num_heads

    def _sizes(self, role: str, O: int, I: int) -> dict[str, list[int]]:
        """Of the train of one head."""
        modes = Modes(mode_factors(O, self.modes), mode_factors(I, self.modes))
        with about(role):
            return {**modes._asdict(), "ranks": train_ranks(self.name, modes, self.keep, self.rank)}
