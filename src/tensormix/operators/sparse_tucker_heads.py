"""The projections of one attention as one Tucker tensor whose cores are mostly zero.

Shape letters (this file): those of `tucker_heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from tensormix.operators.sparse import Sparse
from tensormix.operators.tucker_heads import TuckerHeads


class SparseTuckerHeads(TuckerHeads):
    """`TuckerHeads` of which each group stores `num_values` entries of its core, and where they stand: see `Sparse`.

    The cores are small, so they are written out in each call and multiplied as dense ones; `macs_per_token` counts
    them so.

    Args:
        num_values: of each group of parts that have equally many heads, in the order of their first parts.

    Raises:
        ValueError: a rank or a number of values is not possible, or there are not as many numbers as groups.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        head_dim: int,
        parts: Sequence[Sequence[Any]],
        ranks: Sequence[int],
        num_values: Sequence[int],
    ) -> None:
        self.num_values = list(num_values)
        super().__init__(hidden_size=hidden_size, head_dim=head_dim, parts=parts, ranks=ranks)
        if len(self.num_values) != len(self.groups):
            raise ValueError(
                f"SparseTuckerHeads: num_values is a number for each of the {len(self.groups)} groups of parts with "
                f"equally many heads, got {len(self.num_values)}"
            )

    @property
    def sizes(self) -> dict[str, Any]:
        return {**super().sizes, "num_values": self.num_values}

    def _add_core(self, number: int, rows: int, columns: int) -> None:
        values = self.num_values[number] if number < len(self.num_values) else 1  # too few are refused afterwards
        self.add_module(f"core_{number}", Sparse(columns, rows, num_values=values))

    def whole_core(self, number: int) -> Tensor:  # (Q, H S R)
        return cast(Sparse, self.get_submodule(f"core_{number}")).to_dense()

    def fill_core(self, number: int, core: Tensor) -> None:  # (Q, H S R)
        """With the largest entries."""
        found = Sparse.from_dense(core, num_values=self.num_values[number])
        self.get_submodule(f"core_{number}").load_state_dict(found.state_dict())
