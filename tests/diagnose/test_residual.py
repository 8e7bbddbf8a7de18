from __future__ import annotations

import math

import pytest
import torch
from chain import Chain, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensormix.diagnose import SELECTABLE
from tensormix.diagnose.residual import ResidualStream, last_compressed
from tensormix.operators import Bypass, Dense
from tensormix.sites import find_sites, install
from zoo import make, token_ids


def turned(degrees: float, scale: float, width: int = 8) -> Tensor:
    """Every vector is turned by the same angle: a rotation in each of width / 2 planes."""
    angle = math.radians(degrees)
    plane = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return scale * torch.block_diag(*[plane] * (width // 2))


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-4, 180), st.floats(0.01, 20))
def test_a_planted_rotation_is_found(degrees: float, scale: float) -> None:
    dense, model = Chain(4).double(), Chain(4).double()
    install(model, "layers.1.down_proj", Dense.from_dense(turned(degrees, scale)))
    rows = ResidualStream()(model, [tokens(), tokens(1, 3, seed=5)], reference=dense)
    layers = [row for row in rows if row["kind"] == "residual"]
    assert [row["layer"] for row in layers] == [0, 1, 2, 3, 4] and all(row["num_tokens"] == 15 for row in layers)
    for row in layers:
        changed = row["layer"] >= 2  # what leaves block 1, and all after it
        assert row["angle"] == pytest.approx(degrees if changed else 0, rel=1e-7, abs=1e-9)
        assert row["norm_ratio"] == pytest.approx(scale if changed else 1, rel=1e-9)
    last = rows[-1]
    assert last["kind"] == "residual_last" and last["block"] == 1 and last["angle"] == layers[2]["angle"]


def test_the_last_compressed_block_of_real_models() -> None:
    dense, model = make("gpt2"), make("gpt2")
    assert last_compressed(model) is None
    rows = ResidualStream()(model, [token_ids()], reference=dense)
    assert {row["kind"] for row in rows} == {"residual"} and max(row["angle"] for row in rows) == 0
    install(model, "transformer.h.2", Bypass())
    assert last_compressed(model) == 2
    rows = ResidualStream()(model, [token_ids()], reference=dense)
    assert rows[-1]["block"] == 2 and rows[-1]["angle"] > 1
    assert [row["angle"] for row in rows[:3]] == [0, 0, 0]  # nothing before the dropped block has changed
    install(model, "transformer.h.1.mlp.c_fc", Dense.from_dense(find_sites(model)[8].weight))
    assert last_compressed(model) == 2


def test_tokens_of_length_zero_have_no_angle() -> None:
    dense, model = Chain(1), Chain(1)
    with torch.no_grad():
        dense.embedding[3] = model.embedding[3] = 0
    ids = torch.tensor([[3, 4, 3, 5]])
    assert all(row["num_tokens"] == 2 for row in ResidualStream()(model, [ids], reference=dense))
    with pytest.raises(ValueError, match="at layer 0 every hidden state has length zero"):
        ResidualStream()(model, [torch.tensor([[3, 3]])], reference=dense)


def test_errors() -> None:
    with pytest.raises(ValueError, match="residual_stream: it needs the dense model as reference, and none was given"):
        ResidualStream()(Chain(2), [tokens()])
    with pytest.raises(ValueError, match="residual_stream: it needs batches of tokens, and none was given"):
        ResidualStream()(Chain(2), [], reference=Chain(2))
    with pytest.raises(ValueError, match="this model has 2 blocks and the dense reference 3; the reference must be"):
        ResidualStream()(Chain(2), [tokens()], reference=Chain(3))


def test_the_table_names_each_diagnostic_as_itself() -> None:
    assert all(diagnostic().name == name and diagnostic.__doc__ for name, diagnostic in SELECTABLE.items())
