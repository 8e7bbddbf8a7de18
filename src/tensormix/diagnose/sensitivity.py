"""Perplexity when only one block is changed (arXiv 2606.03465, Fig. 1 and 8): dropped, or compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

from torch import nn

from tensormix.diagnose.base import Batches, Compress, Diagnostic, Row, mean_loss, perplexity_of
from tensormix.operators import Bypass
from tensormix.sites import install, locate_blocks, returns_of


class DropSensitivity(Diagnostic):
    """Perplexity with one block dropped, for each block in turn, beside that of the whole model.

    Rows of kind "sensitivity" with change "drop". The model is afterwards what it was. Raises ValueError without
    batches.
    """

    looks_at: ClassVar[Literal["dense", "pair"]] = "dense"
    name: Literal["drop_sensitivity"] = "drop_sensitivity"

    def measure(self, model: nn.Module, batches: Batches) -> list[Row]:
        return _one_by_one(model, batches, "drop", lambda index: _drop(model, index))


class CompressSensitivity(Diagnostic):
    """Perplexity of the dense model with one block compressed as the plan says, for each block in turn.

    Rows of kind "sensitivity" with change "compress", about the reference; it is afterwards what it was.
    Raises ValueError without batches, without a reference, and without a way to compress a block.
    """

    looks_at: ClassVar[Literal["dense", "pair"]] = "pair"
    needs: ClassVar[tuple[str, ...]] = ("batches", "reference", "compress")
    name: Literal["compress_sensitivity"] = "compress_sensitivity"

    def measure(self, model: nn.Module, batches: Batches, reference: nn.Module, compress: Compress) -> list[Row]:
        return _one_by_one(reference, batches, "compress", lambda index: compress(reference, index))


def _one_by_one(model: nn.Module, batches: Batches, change: str, apply: Callable[[int], None]) -> list[Row]:
    whole = mean_loss(model, batches)
    rows = []
    for index in range(len(locate_blocks(model)[1])):
        with _restored(model, index):
            apply(index)
            loss = mean_loss(model, batches)
        rows.append(
            {
                "kind": "sensitivity",
                "change": change,
                "block": index,
                "value": perplexity_of(loss),
                "loss": loss,
                "whole": perplexity_of(whole),
                "whole_loss": whole,
            }
        )
    return rows


@contextmanager
def _restored(model: nn.Module, index: int) -> Iterator[None]:
    """A copy of one block stands in its place while this is open; the block itself comes back."""
    layers = locate_blocks(model)[1]
    own = layers[index]
    layers[index] = copy.deepcopy(own)
    try:
        yield
    finally:
        layers[index] = own


def _drop(model: nn.Module, index: int) -> None:
    root, layers = locate_blocks(model)
    old = layers[index]
    bypass = Bypass(returns=returns_of(model, index), attention_type=getattr(old, "attention_type", None))
    install(model, f"{root}.{index}", bypass)
