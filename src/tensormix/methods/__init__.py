"""How an operator is fitted; the table is the table of contents."""

from __future__ import annotations

from tensormix.methods.base import BlockMethod, LinearMethod, Method
from tensormix.methods.mixt import Mixt
from tensormix.methods.null import DropBlocks, MeanOutput, ZeroMethod
from tensormix.methods.svd import Svd

__all__ = [
    "METHODS", "BlockMethod", "DropBlocks", "LinearMethod", "MeanOutput", "Method", "Mixt", "Svd", "ZeroMethod",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    "mixt": Mixt,
    "svd": Svd,
    "zero": ZeroMethod,
    "mean_output": MeanOutput,
    "drop_blocks": DropBlocks,
}
