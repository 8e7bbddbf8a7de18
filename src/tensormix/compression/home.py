"""Where the blocks of a model are while it is walked."""

from __future__ import annotations

from tensormix.rows import Row
from tensormix.sites import Site
from tensormix.sites.through import Blocks


class Home(Blocks):
    """Where the blocks are while the model is walked: here in the model itself, all the time."""

    def finished(self, index: int) -> list[Row] | None:
        """The rows of a block that an earlier walk finished; None if it is still to be done."""
        return None

    def restore(self, index: int) -> None:
        """Block `index` is afterwards as the earlier walk left it, weights included."""

    def dense_bits(self, site: Site) -> int:
        """What the weight of a site, or all of a block, takes where it is stored."""
        weights = site.module.state_dict().values() if site.kind == "block" else [site.weight]
        return sum(8 * weight.numel() * weight.element_size() for weight in weights)

    def leave(self, index: int, rows: list[Row]) -> None:
        """The walk is done with block `index`, which may be put away."""
