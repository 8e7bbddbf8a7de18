from __future__ import annotations

import math

import pytest
import torch
from chain import Chain, tokens
from torch import nn
from torch.nn import functional as F

from tensormix.diagnose.base import mean_loss
from tensormix.diagnose.sensitivity import CompressSensitivity, DropSensitivity
from tensormix.operators import Bypass, Zero
from tensormix.sites import install
from zoo import make, token_ids


def test_the_mean_loss_counts_every_token_but_the_first() -> None:
    model, batches = Chain(2), [tokens(2, 6), tokens(1, 3, seed=4)]
    losses = [
        F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none") for b in batches for ids in b[:, None]
    ]
    assert mean_loss(model, batches) == pytest.approx(torch.cat(losses).mean().item())
    with pytest.raises(ValueError, match="needs windows of at least two tokens"):
        mean_loss(model, [tokens(2, 1)])


def test_only_the_block_that_does_something_is_missed() -> None:
    model, ids = Chain(4), tokens()
    with torch.no_grad():
        model.get_parameter("layers.2.down_proj.weight").mul_(-3)
    rows = DropSensitivity()(model, [ids])
    whole = math.exp(mean_loss(model, [ids]))
    assert [row["block"] for row in rows] == [0, 1, 2, 3] and all(row["whole"] == whole for row in rows)
    assert [row["value"] == whole for row in rows] == [True, True, False, True]
    assert all(row["change"] == "drop" and row["kind"] == "sensitivity" for row in rows)


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma3"])
def test_each_row_is_the_model_without_that_block(family: str) -> None:
    model, ids = make(family), token_ids()
    own = list(model.get_submodule("model.layers" if family != "gptj" else "transformer.h").children())
    rows = DropSensitivity()(model, [ids])
    for index in (0, 3):
        other = make(family)
        root = "model.layers" if family != "gptj" else "transformer.h"
        returns = "tuple" if family == "gptj" else "tensor"
        attention = getattr(own[index], "attention_type", None)
        install(other, f"{root}.{index}", Bypass(returns=returns, attention_type=attention))
        assert rows[index]["loss"] == pytest.approx(mean_loss(other, [ids]), rel=1e-6)
    blocks = list(model.get_submodule("model.layers" if family != "gptj" else "transformer.h").children())
    assert all(a is b for a, b in zip(own, blocks, strict=True))


def test_each_block_is_compressed_alone() -> None:
    dense, ids = Chain(3), tokens()
    seen: list[int] = []

    def compress(model: nn.Module, index: int) -> None:
        assert all(isinstance(m.get_submodule("down_proj"), nn.Linear) for m in dense.layers)
        seen.append(index)
        install(model, f"layers.{index}.down_proj", Zero(8, 8))

    rows = CompressSensitivity()(Chain(3), [ids], reference=dense, compress=compress)
    assert seen == [0, 1, 2]
    assert [row["value"] for row in rows] == pytest.approx([11.0] * 3)  # nothing arrives: all 11 tokens are alike
    assert rows[0]["change"] == "compress" and rows[0]["whole_loss"] == mean_loss(dense, [ids])


def test_the_block_comes_back_after_an_error() -> None:
    dense = Chain(2)
    own = list(dense.layers)

    def fails(model: nn.Module, index: int) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        CompressSensitivity()(dense, [tokens()], reference=dense, compress=fails)
    assert all(a is b for a, b in zip(own, dense.layers, strict=True))
    with pytest.raises(ValueError, match="compress_sensitivity: it needs a way to compress one block"):
        CompressSensitivity()(dense, [tokens()], reference=dense)
