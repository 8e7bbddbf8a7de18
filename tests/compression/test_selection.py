"""Blocks chosen by what they do to the hidden states: the right ones, in memory and streamed, for every family."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from plans import plan_of
from streamed import leftovers
from tensormix.cli.tables import show_check
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.compression.while_loading import CompressConfig
from tensormix.fitting.block_distances import BlockDistances
from tensormix.methods import DropBlocks, Svd
from tensormix.models import load_model
from tensormix.operators import Bypass
from tensormix.recipe import Recipe
from tensormix.run.check import check
from tensormix.sites import blocks
from zoo import MOE, ZOO, make, token_ids

BATCHES = [token_ids(seed=1), token_ids(seed=2, length=7)]
TURNS = (0.5, 0.9, -0.9, 0.1, 0.6, 0.2)  # radians


class Rotate(nn.Module):
    """Turns every hidden state by the same angle, so that all distances are known."""

    def __init__(self, angle: float, width: int = 8) -> None:
        super().__init__()
        cos, sin = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        self.turn = nn.Linear(width, width, bias=False)
        self.turn.weight = nn.Parameter(torch.block_diag(*[turn] * (width // 2)))

    def forward(self, hidden, **_):
        return self.turn(hidden)


class Rotations(nn.Module):
    def __init__(self, turns) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(61, 8, dtype=torch.float64)
        self.layers = nn.ModuleList(Rotate(turn) for turn in turns)

    def forward(self, ids, **_):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def choosing(choose, count, blocks="all", **more) -> dict:
    return {"method": DropBlocks(choose=choose, count=count, **more), "blocks": blocks}


def dropped(model) -> list[int]:
    return [index for index, block in enumerate(blocks(model)) if isinstance(block, Bypass)]


def test_the_two_choices_differ_where_they_must():
    """Block 2 undoes block 1: together they are the identity, though each turns more than any other. Block influence
    looks at each alone and takes blocks 3 and 5, which are not neighbours."""
    model = Rotations(TURNS)
    rows = compress(model, plan_of(choosing("angular", 2)), BATCHES)
    assert dropped(model) == [1, 2] and [row["window"] for row in rows] == [[1, 2], [1, 2]]
    assert abs(rows[0]["angle"]) < 1e-12
    sums = [abs(a + b) / math.pi for a, b in pairwise(TURNS)]
    assert list(rows[0]["candidates"]) == ["0", "1", "2", "3", "4"] and "candidates" not in rows[1]
    assert list(rows[0]["candidates"].values()) == pytest.approx(sums, abs=1e-12)

    model = Rotations(TURNS)
    rows = compress(model, plan_of(choosing("influence", 2)), BATCHES)
    assert dropped(model) == [3, 5]
    assert [row["influence"] for row in rows] == pytest.approx([1 - math.cos(0.1), 1 - math.cos(0.2)])
    assert [row["chosen_by"] for row in rows] == ["influence", "influence"]


@settings(deadline=None, max_examples=25)
@given(turns=st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=6), data=st.data())
def test_no_other_choice_turns_less(turns, data):
    count = data.draw(st.integers(1, len(turns)))
    model = Rotations(turns)
    compress(model, plan_of(choosing("angular", count, tokens="all")), BATCHES)
    found = dropped(model)
    ends = [abs(sum(turns[i : i + count])) for i in range(len(turns) - count + 1)]
    ends = [min(end % (2 * math.pi), 2 * math.pi - end % (2 * math.pi)) for end in ends]
    assert found == list(range(found[0], found[0] + count))
    assert ends[found[0]] == pytest.approx(min(ends), abs=1e-7)
    model = Rotations(turns)
    compress(model, plan_of(choosing("influence", count)), BATCHES)
    alone = sorted(abs(turn) for turn in turns)[:count]
    assert sorted(abs(turns[i]) for i in dropped(model)) == pytest.approx(alone, abs=1e-7)


def test_small_angles_are_not_lost_in_the_rounding_of_a_cosine():
    """The cosine of 1e-9 rounds to 1 even in fp64."""
    before, after = torch.tensor([[[1.0, 0.0]]]).double(), torch.tensor([[[1.0, 1e-9]]]).double()
    distances = BlockDistances()
    distances.update(before, 5 * after)
    assert distances.angle == pytest.approx(1e-9 / math.pi) and distances.influence == pytest.approx(0.5e-18)


def test_the_last_token_of_each_sequence_or_all():
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    after = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, 1.0]]])
    last, every = BlockDistances("last"), BlockDistances("all")
    last.update(before, after)
    every.update(before, after)
    assert last.angle == pytest.approx((0 + 0.5) / 2) and last.num_tokens == 2
    assert every.angle == pytest.approx((0.5 + 0 + 1 + 0.5) / 4)
    assert every.influence == pytest.approx((1 + 0 + 2 + 1) / 4)


def planted(family, index=2, **changes):
    """A model whose block `index` does nothing: all that is added to the residual stream there is zero."""
    model = make(family, **changes)
    with torch.no_grad():
        for name, parameter in blocks(model)[index].named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.zero_()
    return model


@pytest.mark.parametrize("family", [*ZOO, *MOE])
def test_a_block_that_does_nothing_is_chosen_and_nothing_changes(family):
    model = planted(family)
    expected = model(token_ids(), use_cache=False).logits
    rows = compress(model, plan_of(choosing("angular", 1)), BATCHES)
    assert dropped(model) == [2] and rows[0]["angle"] == 0
    assert torch.equal(model(token_ids(), use_cache=False).logits, expected)
    model = planted(family)
    assert compress(model, plan_of(choosing("influence", 1)), BATCHES)[0]["influence"] == 0
    assert dropped(model) == [2]


@pytest.mark.parametrize(("family", "spill"), [("gemma3", True), ("gptj", False), ("mixtral", False)])
def test_streamed_it_is_the_same(tmp_path, family, spill):
    planted(family).save_pretrained(tmp_path / "dense")
    rules = plan_of(choosing("influence", 1, "first 3"), choosing("angular", 1, "0-1"), {"method": Svd(keep=0.5)})
    in_memory = compress(load_model(tmp_path / "dense"), rules, BATCHES)
    rows = compress_checkpoint(tmp_path / "dense", tmp_path / "out", rules, BATCHES, spill=spill)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in in_memory]
    assert 2 in dropped(load_model(tmp_path / "out")) and len(dropped(load_model(tmp_path / "out"))) == 2
    assert not [name for name in leftovers(tmp_path) if name.startswith(".")]
    assert compress_checkpoint(tmp_path / "dense", tmp_path / "out", rules, BATCHES) == rows  # nothing to do


def test_blocks_that_an_earlier_rule_claims_are_left_alone():
    model = Rotations(TURNS)
    rules = plan_of({"method": Svd(keep=0.9), "blocks": "1"}, choosing("angular", 2), choosing("influence", 1))
    rows = compress(model, rules, BATCHES)
    assert {row["block"]: row["method"] for row in rows} == {
        1: "svd", 3: "drop_blocks", 4: "drop_blocks", 5: "drop_blocks",
    }  # fmt: skip


def test_the_model_keeps_its_mode():
    model = Rotations(TURNS).train()
    compress(model, plan_of(choosing("angular", 2)), BATCHES)
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("rules", "batches", "sentence"),
    [
        (
            [choosing("angular", 2)],
            None,
            r"drop_blocks needs calibration batches \(BlockDistances\), but none were given",
        ),
        ([choosing("angular", 2)], [], "there are no calibration batches: the iterable is empty"),
        (
            [{"method": Svd(keep=0.9), "blocks": "2"}, choosing("angular", 4)],
            BATCHES,
            r"plan\[1\] \(blocks 'all'\): drop_blocks asks for 4 consecutive ones of the 5 blocks that are left to it; "
            "the largest possible count is 3",
        ),
        (
            [choosing("influence", 3, "first 2")],
            BATCHES,
            r"plan\[0\] \(blocks 'first 2'\): drop_blocks asks for 3 of the 2 blocks that are left to it; "
            "the largest possible count is 2",
        ),
    ],
)
def test_what_cannot_be_chosen(rules, batches, sentence):
    with pytest.raises(ValueError, match=sentence):
        compress(Rotations(TURNS), plan_of(*rules), batches)


def test_a_state_without_direction_names_the_blocks():
    model = Rotations(TURNS)
    with torch.no_grad():
        model.layers[3].turn.weight.fill_(torch.nan)
    sentence = r"layers\.2 to layers\.3: hidden states are NaN, infinite or zero there, and have no direction"
    with pytest.raises(ValueError, match=sentence):
        compress(model, plan_of(choosing("angular", 2)), BATCHES)
    assert not dropped(model)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"choose": "angular"}, "give both or neither, got 'angular' and None"),
        ({"count": 2}, "give both or neither, got 'named' and 2"),
        ({"choose": "influence", "count": 1, "tokens": "all"}, "tokens is for choose='angular'"),
        ({"choose": "angle", "count": 1}, "'named', 'angular' or 'influence'"),
    ],
)
def test_settings_that_contradict_each_other(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DropBlocks(**settings)


def test_while_a_checkpoint_is_loaded_nothing_can_be_measured():
    with pytest.raises(ValueError, match=r"drop_blocks needs calibration \(BlockDistances\)"):
        CompressConfig(plan_of(choosing("angular", 1)))
    with pytest.raises(ValueError, match=r"plan\[0\] .* its blocks are chosen by measuring, which was not done"):
        plan_of(choosing("angular", 1)).resolve([], 4)


def test_a_check_counts_the_last_blocks_that_could_be_chosen(tiny, tmp_path, capsys):
    method = "{name: drop_blocks, choose: angular, count: 2}"
    text = f"model: {tiny}\nplan: [{{blocks: first 3, method: {method}}}]\ncalibration: {{text: {{exam: true}}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    result = check(Recipe.load(tmp_path / "recipe.yaml"))
    assert result["assumed"] and [row["block"] for row in result["sites"]] == [1, 2]
    show_check(Console(), result)
    assert "Which blocks a rule chooses is measured in a run" in capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(text.rpartition("calibration")[0])
    with pytest.raises(ValueError, match="the method drop_blocks needs calibration, and there is no such section"):
        Recipe.load(tmp_path / "recipe.yaml")


def gemma4(seed: int = 0):
    """Of four blocks the last two read the keys and values of the first two; block 0 changes nothing."""
    config = Gemma4TextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(config).eval()
    for name, parameter in model.model.layers[0].named_parameters():
        if name.startswith("post") and "norm" in name:
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("choose", ["influence", "angular"])
def test_measuring_passes_by_blocks_that_others_need(choose):
    """Block 0 changes least, but a later one reads its keys and values; with that one it may go."""
    x = [torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))]
    model = gemma4()
    compress(model, plan_of(choosing(choose, 1)), x)
    assert dropped(model) in ([2], [3])
    before = gemma4()
    with pytest.raises(ValueError, match=r"layers\.[01]: block [23] needs"):
        compress(before, plan_of(choosing(choose, 1, "0-1")), x)
    assert dropped(before) == []
    with_reader = gemma4()
    compress(with_reader, plan_of({"method": DropBlocks(), "blocks": "2"}, choosing(choose, 1)), x)
    assert dropped(with_reader) == [0, 2]
