"""As many blocks of the inputs as of the outputs: Monarch (arXiv 2204.00595), and with rank above 1 a block tensor
train."""

from __future__ import annotations

from typing import Any

from tensormix.operators.block_tensor_train import BlockTensorTrain


class Monarch(BlockTensorTrain):
    """A `BlockTensorTrain` with b blocks on both sides: b r (I + O) numbers, as many as a low rank of b r, with as many
    MACs; with one block it is one.

    Raises:
        ValueError: `blocks` does not divide both sizes, or the rank of a slice is outside 1..min(i, o).
    """

    def __init__(self, in_features: int, out_features: int, *, blocks: int, rank: int = 1) -> None:
        if blocks < 1 or in_features % blocks or out_features % blocks:
            raise ValueError(
                f"Monarch: blocks must divide both sizes of a {in_features}x{out_features} layer, got {blocks}"
            )
        limit = min(in_features, out_features) // blocks
        if not 1 <= rank <= limit:
            raise ValueError(
                f"Monarch: rank must be in 1..{limit} for {blocks} blocks of a {in_features}x{out_features} layer, "
                f"got {rank}"
            )
        super().__init__(in_features, out_features, in_blocks=blocks, out_blocks=blocks, rank=rank)
        self.blocks = blocks

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {**ends, "blocks": self.blocks, "rank": self.rank}
