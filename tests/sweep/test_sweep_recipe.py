"""Sweeps: which cells they have, and what is said about a slip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipe_files import FULL, load
from tensormix.recipe import Baselines, Cell, Recipe, Sweep


def test_a_sweep_with_a_recipe_of_its_own(tmp_path):
    text = "recipe: {model: ./m}\nnum_branches: [3, 4]\ndepths: [1, 2]\ndirections: [last, first]"
    sweep = load(tmp_path, text, Sweep, "sweep.yaml")
    assert Path(sweep.recipe.model) == tmp_path / "m"
    cells = sweep.cells(4)
    assert len(cells) == len(set(cells)) == 8
    assert cells[0] == Cell(depth=1, direction="last", method="mixt", num_branches=3)


def test_a_sweep_over_a_recipe_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(FULL.split("plan:")[0])
    sweep = load(tmp_path, "base: recipe.yaml\nbaselines: {}", Sweep, "sweep.yaml")
    assert sweep.recipe == Recipe.load(tmp_path / "recipe.yaml")
    assert [cell.depth for cell in sweep.cells(3) if cell.method == "mixt"] == [1, 2, 3]
    assert [(cell.depth, cell.method) for cell in sweep.cells(2)[2:]] == [
        (1, "zero"), (1, "drop_blocks"), (2, "zero"), (2, "drop_blocks")
    ]  # fmt: skip
    assert Sweep.model_validate(json.loads(sweep.model_dump_json())) == sweep


def test_directions_with_depths_of_their_own(tmp_path):
    text = "recipe: {model: m}\ndepths: all\ndirections: {last: , first: {depths: [2]}}\nbaselines: {depths: [3]}"
    cells = load(tmp_path, text, Sweep).cells(3)
    assert [(c.direction, c.depth) for c in cells if c.method == "mixt"] == [
        ("last", 1), ("last", 2), ("last", 3), ("first", 2)
    ]  # fmt: skip
    assert {c.depth for c in cells if c.method != "mixt"} == {3}


def test_baselines_of_a_direction_take_its_depths():
    sweep = Sweep.model_validate(
        {
            "recipe": {"model": "m"},
            "directions": {"first": {"depths": [2]}},
            "baselines": {"methods": ["zero"], "directions": ["first"]},
        }
    )
    assert [c.depth for c in sweep.cells(3)] == [2, 2]
    assert Baselines().methods == ("zero", "drop_blocks")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("depths: [1]", "sweep: needs base (the path of a recipe) or recipe (the recipe itself)."),
        ("recipe: {model: m}\nbase: m", "sweep: give base or recipe, not both"),
        ("recipe: {model: m, plann: []}", "sweep.recipe: unknown key 'plann', did you mean 'plan'? Known: model, "),
        ("recipe: {model: m}\ndepth: all", "sweep: unknown key 'depth', did you mean 'depths'?"),
        ("recipe: {model: m}\ndepths: [0]", "sweep.depths: depths must be 'all' or a list of numbers of blocks from 1"),
        (
            "recipe: {model: m}\ndirections: [lst]",
            "sweep.directions: must be 'last' or 'first', got 'lst', did you mean 'last'?",
        ),
        ("recipe: {model: m}\ndirections: {last: {depht: all}}", "sweep.directions.last: unknown key 'depht', did you"),
        ("recipe: {model: m}\nbaselines: {methods: [svd]}", "sweep.baselines.methods[0]: must be 'zero' or 'drop_b"),
        (
            "recipe: {model: m, recover: {steps: 1, parameters: lora, text: [{exam: true}]}}\nbaselines: {}",
            "sweep: baselines: recover.parameters 'lora' trains compressed layers alone, and dropped blocks leave",
        ),
        (
            "recipe: {model: m, plan: [{method: {name: zero}}]}",
            "sweep: the recipe's plan is a template: it must be empty or one rule with the method mixt.",
        ),
    ],
)
def test_slips_in_a_sweep(tmp_path, text, sentence):
    with pytest.raises(ValueError) as error:
        load(tmp_path, text, Sweep)
    assert str(error.value).startswith(sentence)


def test_a_sweep_deeper_than_the_model():
    sweep = Sweep.model_validate({"recipe": {"model": "m"}, "depths": [2, 9]})
    with pytest.raises(ValueError, match="sweep: depths asks for 9 blocks; the model has 4"):
        sweep.cells(4)
