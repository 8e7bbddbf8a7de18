"""A smaller operator among zeros: what is left of a layer when neurons or channels of heads are removed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tensormix.operators.base import StructuredLinear


class Placed(StructuredLinear):
    """W (O, I) holds the inner operator's W; all other rows and columns are zero.

    The rows of W are `out_groups` equal groups, and the inner rows, in as many groups, lie at the start of each: with
    the heads as groups every head keeps its first channels. The columns and `in_groups` likewise. What is zero is
    neither stored nor multiplied, and the layer keeps its shape.

    Raises:
        ValueError: the inner operator is larger than the layer, or a size is no multiple of its number of groups.
    """

    def __init__(
        self, in_features: int, out_features: int, *, inner: StructuredLinear, in_groups: int = 1, out_groups: int = 1
    ) -> None:
        super().__init__(in_features, out_features)
        ends = (
            ("in", in_features, inner.in_features, in_groups),
            ("out", out_features, inner.out_features, out_groups),
        )
        for end, size, kept, groups in ends:
            if not 1 <= kept <= size:
                raise ValueError(f"Placed: the inner {end}_features must be in 1..{size}, got {kept}")
            if groups < 1 or size % groups or kept % groups:
                raise ValueError(
                    f"Placed: {end}_groups={groups} must divide the {end}_features of the layer ({size}) and of the "
                    f"inner operator ({kept})"
                )
        self.inner, self.in_groups, self.out_groups = inner, in_groups, out_groups

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,  # (O, I)
        *,
        inner_type: type[StructuredLinear],
        kept: tuple[int, int],
        in_groups: int = 1,
        out_groups: int = 1,
        **sizes: Any,
    ) -> Placed:
        """`inner_type.from_dense(..., **sizes)` of the kept (rows, columns) of `weight`; the others become zero."""
        O, I = weight.shape
        groups = weight.detach().reshape(out_groups, O // out_groups, in_groups, I // in_groups)
        core = groups[:, : kept[0] // out_groups, :, : kept[1] // in_groups].reshape(kept)
        inner = inner_type.from_dense(core, **sizes)
        return cls(I, O, inner=inner, in_groups=in_groups, out_groups=out_groups).to(weight)

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self._filled(self.inner(self._picked(x)))

    def _picked(self, x: Tensor) -> Tensor:  # (..., I) -> (..., inner in_features)
        kept = self.inner.in_features // self.in_groups
        if self.inner.in_features == self.in_features:
            return x
        return x.unflatten(-1, (self.in_groups, self.in_features // self.in_groups))[..., :kept].flatten(-2)

    def _filled(self, y: Tensor) -> Tensor:  # (..., inner out_features) -> (..., O)
        if self.inner.out_features == self.out_features:
            return y  # a padding of nothing would copy
        y = y.unflatten(-1, (self.out_groups, self.inner.out_features // self.out_groups))
        return F.pad(y, (0, self._missing(self.out_features, self.inner.out_features, self.out_groups))).flatten(-2)

    def to_dense(self) -> Tensor:  # (O, I)
        rows = self._missing(self.out_features, self.inner.out_features, self.out_groups)
        columns = self._missing(self.in_features, self.inner.in_features, self.in_groups)
        core = self.inner.to_dense().unflatten(1, (self.in_groups, -1)).unflatten(0, (self.out_groups, -1))
        return F.pad(core, (0, columns, 0, 0, 0, rows)).flatten(0, 1).flatten(1, 2)

    @staticmethod
    def _missing(size: int, kept: int, groups: int) -> int:
        """How many zeros follow in each group."""
        return (size - kept) // groups

    @property
    def sizes(self) -> dict[str, Any]:
        groups = {"in_groups": self.in_groups, "out_groups": self.out_groups}
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "inner": self.inner.spec,
            **groups,
        }

    @property
    def macs_per_token(self) -> int:
        return self.inner.macs_per_token
