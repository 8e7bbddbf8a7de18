"""The heads of an attention in one Tucker tensor.

Shape letters: O out_features, I in_features, D hidden size, H heads, C channels of a head, P parts of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.hooi import Tucker, full_hosvd, held_by, hooi
from tensormix.methods.base import Heads, JointMethod, Layer, Statistics
from tensormix.methods.neurons import check_together, unchanged, with_bias
from tensormix.operators import Dense, StructuredLinear, TuckerHeads
from tensormix.operators.tucker_heads import Part, checked_ranks, groups_of, num_params

_ROLES = ("q", "k", "v", "o")
Shapes = Mapping[str, tuple[int, int]]  # role -> (O, I)


class TuckerAttention(JointMethod):
    """q, k, v and o of one attention as one tensor (hidden size, heads, channels of a head, part), in Tucker form.

    The factors of the hidden size, of the channels and of the parts are shared by all heads, and each head keeps a core
    of its own. They are found by HOOI, which never holds less than the truncated HOSVD. Where keys and values have
    fewer heads, they share the factors with q and o, but their parts and cores are their own.

    With `keep` the ranks are those that hold most of the tensor within the budget, of all that the cut HOSVD offers.

    `orientation: published` cuts the rows of q, k, v as the released code does: the slices of a "head" are then
    slices of the hidden size that is read, and the channels of all heads lie along the other axis.

    Raises ValueError unless exactly one of `keep` and `ranks` is given.
    """

    source = "TensorLLM, arXiv 2501.15674 (its Tucker-4 form); ranks by energy and grouped queries are ours"
    summary = "q, k, v and o of all heads share Tucker factors, and each head has a small core."
    roles = _ROLES
    size = "keep"

    name: Literal["tucker_heads"] = "tucker_heads"
    keep: float | None = Field(
        default=None, gt=0, le=1
    )  # fraction of the dense numbers; 1 leaves the layers as they are
    ranks: tuple[int, int, int] | None = Field(default=None, strict=False)  # of the hidden size, channels, parts
    orientation: Literal["heads", "published"] = "heads"
    steps: int = Field(default=50, ge=1)  # of HOOI, at most
    tolerance: float = Field(default=1e-5, ge=0, allow_inf_nan=False)  # stops where a step gains less of the energy

    @model_validator(mode="after")
    def _one_of_both(self) -> TuckerAttention:
        if (self.keep is None) == (self.ranks is None):
            raise ValueError("tucker_heads needs either keep (a fraction) or ranks (of hidden size, channels, parts)")
        return self

    def empty(self, shapes: Shapes, heads: Heads | None) -> dict[str, StructuredLinear]:
        """With `keep` the ranks depend on the weights: these are those of a tensor whose energy lies evenly."""
        check_together(self.name, shapes, _ROLES)
        with torch.device("meta"):
            if self.keep == 1:
                return {role: Dense(I, O) for role, (O, I) in shapes.items()}
            parts, D, C = self._layout(shapes, heads)
            every = [len(names) for names in groups_of(parts)]
            even = [torch.ones(D, C, device="cpu").cumsum(0).cumsum(1) * number for number in range(1, max(every) + 1)]
            return self._views(self._operator(parts, D, C, self._ranks(parts, D, C, even)))

    def fit(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], heads: Heads | None
    ) -> dict[str, StructuredLinear]:
        check_together(self.name, layers, _ROLES)
        if self.keep == 1:
            return unchanged(layers)
        shapes = {role: (layer.weight.shape[0], layer.weight.shape[1]) for role, layer in layers.items()}
        parts, D, C = self._layout(shapes, heads)
        whole = full_hosvd(
            [torch.stack([_head_tensor(layers[name].weight, parts[name], C) for name in names], dim=-1)
             for names in groups_of(parts)]
        )  # fmt: skip
        largest = max(map(len, groups_of(parts)))
        ranks = self._ranks(parts, D, C, [held_by(whole, q) for q in range(1, largest + 1)])
        owner = self._operator(parts, D, C, ranks).to(layers["q"].weight)
        fill(owner, hooi(whole, ranks, self.steps, self.tolerance))
        return {role: with_bias(view, layers[role].bias) for role, view in self._views(owner).items()}

    def _layout(self, shapes: Shapes, heads: Heads | None) -> tuple[dict[str, Part], int, int]:
        """The parts by role, the hidden size and the channels of a head."""
        assert heads is not None
        (H, G, C), D = heads, shapes["q"][1]
        if self.orientation == "published":
            if G != H or shapes["q"][0] != D:
                raise ValueError(
                    f"{self.name}: the published orientation needs as many heads of keys as of queries, as wide as the "
                    f"stream, but there are {H} heads of queries and {G} of keys, of {C} channels, and {D} features; "
                    "take orientation: heads"
                )
            return {role: Part(H, False) for role in _ROLES}, D, C
        return {role: Part(G if role in "kv" else H, role != "o") for role in _ROLES}, D, C

    def _ranks(self, parts: dict[str, Part], D: int, C: int, held: list[Tensor]) -> tuple[int, int, int]:
        """`ranks`, or of all that fit into the budget the ones that hold most."""
        dense = sum(D * C * part.num_heads for part in parts.values())
        if self.ranks is not None:
            checked_ranks(self.ranks, D, C, max(map(len, groups_of(parts))))
            if num_params(parts, D, C, self.ranks) > dense:
                raise ValueError(self._expands(parts, D, C, dense))
            return self.ranks
        assert self.keep is not None
        room = int(self.keep * dense + 1e-6)
        best, most = None, -1.0
        for q, table in enumerate(held, start=1):
            for s in range(1, C + 1):
                r = _largest(parts, D, C, s, q, room)
                if r >= 1 and float(table[r - 1, s - 1]) > most:
                    best, most = (r, s, q), float(table[r - 1, s - 1])
        if best is None:
            least = ceil(num_params(parts, D, C, (1, 1, 1)) / dense * 1e6) / 1e6
            raise ValueError(f"{self.name}: keep={self.keep} leaves no rank; the smallest usable keep is {least}")
        return best

    def _expands(self, parts: dict[str, Part], D: int, C: int, dense: int) -> str:
        assert self.ranks is not None
        R, S, Q = self.ranks
        largest = _largest(parts, D, C, S, Q, dense)
        count = num_params(parts, D, C, self.ranks)
        nearest = f"the largest rank of the hidden size at the same others is {largest}"
        nearest = nearest if largest else "take smaller ones for the channels and parts too"
        return f"{self.name}: ranks={[R, S, Q]} would hold {count:,} numbers, more than the {dense:,} there; {nearest}"

    def _operator(self, parts: dict[str, Part], D: int, C: int, ranks: tuple[int, int, int]) -> TuckerHeads:
        return TuckerHeads(hidden_size=D, head_dim=C, parts=parts, ranks=ranks)

    def _views(self, owner: TuckerHeads) -> dict[str, Any]:
        return dict(owner.views("heads"))


def _largest(parts: dict[str, Part], D: int, C: int, s: int, q: int, room: int) -> int:
    """The largest rank of the hidden size within `room` numbers: they grow with it by equal steps."""
    at_zero, at_one = (num_params(parts, D, C, (r, s, q)) for r in (0, 1))
    return max(0, min(D, (room - at_zero) // (at_one - at_zero)))


def _head_tensor(weight: Tensor, part: Part, C: int) -> Tensor:  # (O, I) -> (D, H, C)
    return (weight.T if part.reads else weight).unflatten(1, (part.num_heads, C))


@torch.no_grad()
def fill(owner: TuckerHeads, tucker: Tucker) -> None:
    """Give an operator these factors and cores."""
    owner.hidden.copy_(tucker.hidden.T)
    owner.channels.copy_(tucker.channels)
    for number, (part, core) in enumerate(zip(tucker.parts, tucker.cores, strict=True)):
        owner.get_parameter(f"part_{number}").copy_(part)
        owner.get_parameter(f"core_{number}").copy_(core.permute(3, 1, 2, 0).flatten(1))  # (Q, H, S, R)
