"""TRAWL: what slices share is found, one slice alone is a truncated SVD, and neighbours share one owner.

Shape letters: D hidden size, F neurons.
"""

from __future__ import annotations

import pytest
import torch

import tensormix
import zoo
from tensormix.methods import Trawl
from tensormix.methods.base import Layer
from tensormix.models import load_model
from tensormix.operators import Owner
from tensormix.plan import Plan

D, F = 10, 16
DOUBLE = {"dtype": torch.float64}


def mlp(blocks: int = 1):
    torch.manual_seed(0)
    before = [f"{block}." for block in range(blocks)] if blocks > 1 else [""]
    shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    return {f"{b}{role}": Layer(torch.randn(shape, **DOUBLE)) for b in before for role, shape in shapes.items()}


def squared_error(layers, fitted):
    return sum(float((fitted[key].to_dense().detach() - layer.weight).square().sum()) for key, layer in layers.items())


def test_one_slice_alone_is_the_truncated_svd():
    """Eckart and Young: equal ranks on both sides, one part."""
    layer = {"up": mlp()["up"]}
    fitted = Trawl(ranks=(4, 4, 1)).fit(layer, {}, None)
    best = float(torch.linalg.svdvals(layer["up"].weight)[4:].square().sum())
    assert squared_error(layer, fitted) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("blocks", [1, 3])
def test_slices_of_few_cores_are_found_again_and_fewer_are_not_enough(blocks):
    planted = Trawl(ranks=(4, 5, 2), num_stacked=blocks).fit(mlp(blocks), {}, None)
    layers = {key: Layer(view.to_dense().detach()) for key, view in planted.items()}
    total = sum(float(layer.weight.square().sum()) for layer in layers.values())
    assert squared_error(layers, Trawl(ranks=(4, 5, 2)).fit(layers, {}, None)) < 1e-20 * total
    assert squared_error(layers, Trawl(ranks=(4, 5, 1)).fit(layers, {}, None)) > 1e-3 * total


def test_equal_neighbours_cost_one_block():
    """Of the same matrices in every block one set is enough: with twice the blocks the ranks stay exact."""
    one = mlp()
    twice = {f"{block}.{key}": layer for block in range(2) for key, layer in one.items()}
    both = Trawl(ranks=(D, 8, 3), num_stacked=2).fit(twice, {}, None)
    alone = Trawl(ranks=(D, 8, 3)).fit(one, {}, None)
    assert squared_error(twice, both) == pytest.approx(2 * squared_error(one, alone), rel=1e-6)


def test_neighbours_share_one_owner_streamed_and_in_memory(tmp_path):
    zoo.make("llama").save_pretrained(tmp_path / "dense")
    rule = {"name": "trawl", "keep": 0.4, "num_stacked": 2}
    plan = Plan.model_validate([{"sites": ["gate", "up", "down"], "method": rule}])
    tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "small", plan)
    model = load_model(tmp_path / "dense")
    rows = tensormix.compress(model, plan)
    again, x = load_model(tmp_path / "small"), zoo.token_ids()
    owners = [part for part in again.modules() if isinstance(part, Owner)]
    assert len(owners) == 2 and all(len(owner.shapes) == 6 for owner in owners)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    held, dense = (sum(row[key] for row in rows) for key in ("parameters", "dense_parameters"))
    assert held <= 0.4 * dense and len(rows) == 12


def test_matrices_that_differ_are_refused():
    with pytest.raises(ValueError) as caught:
        Trawl(keep=0.5, num_stacked=2).empty({"0.up": (16, 10), "1.up": (12, 10)}, None)
    assert all(word in str(caught.value) for word in ("1.up", "12 neurons", "0.up", "16"))
