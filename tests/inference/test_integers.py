"""Cores and factors in integers through torchao, where it is installed; without it a sentence says so."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from tensormix.compression import compress
from tensormix.inference.integers import run_in_integers
from tensormix.methods import Mixt, Rtn, Svd
from tensormix.plan import Plan, Rule
from zoo import make, token_ids

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is an optional extra")


def compressed():
    model = make("llama", hidden_size=64, intermediate_size=96)
    rules = [
        Rule(blocks="0", method=Svd(keep=0.5)),
        Rule(blocks="1", method=Mixt(num_branches=2)),
        Rule(blocks="2", method=Rtn(bits=4, of=Svd(keep=0.5))),
    ]
    compress(model, Plan(tuple(rules)))
    return model


@needs_torchao
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.25)])
def test_operators_run_in_integers_near_their_floats(bits, most):
    model = compressed()
    expected = model(token_ids()).logits
    rows = run_in_integers(model, bits=bits)
    assert len(rows) == 3 * 7
    there = {row["site"].split(".")[2]: row for row in rows}
    assert {block: row["bits"] for block, row in there.items()} == {"0": bits, "1": None, "2": bits}
    assert "unimplemented" in there["1"]["reason"] and there["2"]["operator"] == "LowRank"
    assert all(0 < row["relative_error"] < most for row in rows if row["bits"])
    got = model(token_ids()).logits
    assert 0 < (got - expected).norm() < 2 * most * expected.norm()
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer.left.data) is not torch.Tensor and not layer.left.requires_grad


def test_without_torchao_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"running in integers needs torchao.*pip install 'tensormix\[torchao\]'"):
        run_in_integers(compressed())
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        run_in_integers(compressed(), bits=3)  # pyright: ignore[reportArgumentType]


@needs_torchao
@pytest.mark.filterwarnings("default")
def test_a_dense_model_is_not_touched():
    with pytest.raises(ValueError, match="the model has no operators; compress it first"):
        run_in_integers(make("llama"))
