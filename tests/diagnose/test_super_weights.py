from __future__ import annotations

import copy

import pytest
import torch
from chain import Chain, tokens

from tensormix.diagnose.base import mean_loss
from tensormix.diagnose.super_weights import SuperWeights, candidates
from tensormix.sites import find_sites
from zoo import make, token_ids

BATCHES = [token_ids(2, 12, 1), token_ids(1, 9, 2)]


def plant(model: torch.nn.Module, block: int, row: int, column: int, value: float, expert: int = 0) -> str:
    site = next(s for s in find_sites(model) if s.block == block and s.role == "down")
    with torch.no_grad():
        site.expert_weight(expert)[row, column] = value
    return site.name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_a_planted_super_weight_is_found(family: str) -> None:
    model = make(family)
    assert [row["kind"] for row in SuperWeights()(model, BATCHES)] == ["super_weights"]  # noise is none
    name = plant(model, 2, 5, 7, 1e4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, count = SuperWeights()(model, BATCHES)
    assert (found["site"], found["block"], found["row"], found["column"]) == (name, 2, 5, 7)
    assert found["value"] == 1e4 and found["share"] > 0.9 and found["spike"] > 50 and count["value"] == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert found["loss"] == mean_loss(model, BATCHES)
    plant(model, 2, 5, 7, 0.0)
    assert found["loss_without"] == pytest.approx(mean_loss(model, BATCHES), rel=1e-6)


def test_one_behind_another_and_the_most() -> None:
    model = make("llama")
    names = [plant(model, 1, 3, 4, 3e4), plant(model, 3, 8, 9, -3e4)]
    found = SuperWeights()(model, BATCHES)
    assert {row["site"] for row in found[:-1]} == set(names) and found[-1]["value"] == 2
    assert SuperWeights(most=1)(model, BATCHES)[-1]["value"] == 1


def test_one_expert_of_a_stack() -> None:
    model = make("qwen3_moe")
    visited = {candidate.expert for candidate in candidates(model, BATCHES) if candidate.site.block == 1}
    expert = max(visited)
    plant(model, 1, 6, 2, 1e5, expert)
    found = SuperWeights()(model, BATCHES)[0]
    assert (found["block"], found["expert"], found["row"], found["column"]) == (1, expert, 6, 2)


def test_a_large_output_made_by_many_weights_is_none() -> None:
    model, ids = Chain(2, width=64), [tokens()]
    with torch.no_grad():
        model.layers[1].get_parameter("down_proj.weight")[3] = 1e3 * model.embedding[int(ids[0][0, 0])]
    assert SuperWeights()(model, ids)[-1]["value"] == 0
    assert SuperWeights(share=0.01)(model, ids)[0]["row"] == 3


def test_the_weights_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    plant(model, 2, 5, 7, 1e4)
    before = copy.deepcopy(model.state_dict())
    losses = iter([1.0])
    monkeypatch.setattr("tensormix.diagnose.super_weights.mean_loss", lambda *args: next(losses))
    with pytest.raises(StopIteration):
        SuperWeights()(model, BATCHES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="super_weights: it needs batches of tokens, and none was given"):
        SuperWeights()(Chain(1), [])
