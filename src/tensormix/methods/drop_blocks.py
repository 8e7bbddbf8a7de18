"""Whole blocks left out, named by the plan or chosen by what they do to the hidden states."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from tensormix.fitting.block_distances import BlockDistances
from tensormix.methods.base import BlockMethod, Method
from tensormix.operators import Bypass, outermost


class _Needs:
    """What a method needs depends on its settings; asked of the class it is what the defaults need."""

    def __get__(self, method: DropBlocks | None, owner: type) -> tuple[type, ...]:
        return () if method is None or method.choose == "named" else (BlockDistances,)


class DropBlocks(BlockMethod):
    """The block is left out: its hidden states pass unchanged.

    `choose` says which blocks of the rule: "named", all of them; "angular", the `count` consecutive ones that turn the
    hidden states least from end to end (arXiv 2403.17887, Section 3.2); "influence", the `count` with the lowest block
    influence, each taken alone (ShortGPT, arXiv 2403.03853). Both are measured once, on the dense model.
    """

    source = "arXiv 2403.17887 (angular), arXiv 2403.03853 (influence)"
    summary = "Whole blocks are left out: those that the plan names, or those that change the hidden states least."
    needs: ClassVar[Any] = _Needs()

    name: Literal["drop_blocks"] = "drop_blocks"
    choose: Literal["named", "angular", "influence"] = "named"
    count: int | None = Field(default=None, ge=1)  # blocks to drop of those that the rule is about; not with "named"
    tokens: Literal["last", "all"] = "last"  # of each sequence, whose angles count; block influence takes all

    @model_validator(mode="after")
    def _count_if_chosen(self) -> Self:
        if (self.choose == "named") != (self.count is None):
            needs = "count says how many blocks are chosen, and choose how ('angular' or 'influence')"
            raise ValueError(f"DropBlocks: {needs}; give both or neither, got {self.choose!r} and {self.count}")
        if self.choose != "angular" and self.tokens != "last":
            raise ValueError(f"DropBlocks: tokens is for choose='angular'; with {self.choose!r} leave it out")
        return self

    @property
    def num_chosen(self) -> int | None:
        return self.count

    def named(self, chosen: list[int]) -> list[tuple[list[int], Method]]:
        return [(chosen, DropBlocks())]

    def replace(self, block: nn.Module, *, returns: str = "tensor") -> Bypass:
        operators = tuple(f"{name}." for name, _ in outermost(block))
        # A parameter of the dense block: loaded without this package, its missing value is an error.
        sentinel = next((name for name, _ in block.named_parameters() if not name.startswith(operators)), "weight")
        return Bypass(returns=returns, attention_type=getattr(block, "attention_type", None), sentinel=sentinel)
