"""The MLPs of neighbouring blocks in one Tucker tensor."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tensormix.methods.base import Heads
from tensormix.methods.tucker import Shapes, SharedTucker
from tensormix.operators.tucker_heads import Part


class Trawl(SharedTucker):
    """gate, up and down (transposed) of one block, or of several neighbouring ones, as slices of one tensor.

    All slices share the factors of the hidden size and of the neurons; each is a combination of few cores. The ranks
    are those of the hidden size, of the neurons ("channels") and of the slices ("parts"). The paper writes the dense
    matrices back; here they stay in Tucker form, and are stored and multiplied as such.
    """

    source = "TRAWL, arXiv 2406.17261 (its Tucker form); ranks by energy are ours"
    summary = "The MLP matrices of one block or of neighbours are combinations of few cores between shared factors."
    roles = ("gate", "up", "down")

    name: Literal["trawl"] = "trawl"
    num_stacked: int = Field(default=1, ge=1)  # neighbouring blocks whose matrices are one tensor

    @property
    def num_blocks(self) -> int | None:
        return self.num_stacked

    def layout(self, shapes: Shapes, heads: Heads | None) -> tuple[dict[str, Part], int, int]:
        # Hidden size and neurons of each: what a slice reads, and what it puts out, change places in down.
        sizes = {key: shape if key.endswith("down") else shape[::-1] for key, shape in shapes.items()}
        (D, F), first = next((size, key) for key, size in sizes.items())
        for key, size in sizes.items():
            if size != (D, F):
                raise ValueError(
                    f"{self.name}: {key} is of {size[0]} features and {size[1]} neurons, but {first} of {D} and {F}; "
                    "matrices of one tensor must be alike, so give these blocks rules of their own"
                )
        return {key: Part(1, not key.endswith("down")) for key in shapes}, D, F
