"""Sweeps: which cells they have, and what is said about a slip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipe_files import FULL, load
from tensormix.methods import Mixt
from tensormix.recipe import Baselines, Cell, Recipe, Sweep, schedule


def test_a_sweep_with_a_recipe_of_its_own(tmp_path):
    text = "recipe: {model: ./m}\nvary: {num_branches: [3, 4]}\ndepths: [1, 2]\ndirections: [last, first]"
    sweep = load(tmp_path, text, Sweep, "sweep.yaml")
    assert Path(sweep.recipe.model) == tmp_path / "m"
    cells = sweep.cells(4)
    assert len(cells) == len({cell.name for cell in cells}) == 8
    settings = {"num_branches": 3}
    assert cells[0] == Cell(direction="last", blocks=(3,), method=Mixt(num_branches=3), settings=settings)
    assert cells[-1].name == "first-02-mixt4" and cells[-1].blocks == (0, 1)


def test_a_sweep_over_a_recipe_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(FULL.split("plan:")[0])
    sweep = load(tmp_path, "base: recipe.yaml\nbaselines: {}", Sweep, "sweep.yaml")
    assert sweep.recipe == Recipe.load(tmp_path / "recipe.yaml")
    assert [cell.depth for cell in sweep.cells(3) if cell.method.name == "mixt"] == [1, 2, 3]
    assert [(cell.depth, cell.method.name) for cell in sweep.cells(2)[2:]] == [
        (1, "zero"), (1, "drop_blocks"), (2, "zero"), (2, "drop_blocks")
    ]  # fmt: skip
    assert Sweep.model_validate(json.loads(sweep.model_dump_json())) == sweep


ATTENTION_AND_MLP = """
recipe: {model: m}
depths: [1, 2]
plans:
  Tucker and SVD:
    - {sites: [q, k, v, o], method: {name: tucker_heads, keep: 0.5}}
    - {sites: [gate, up, down], method: {name: svd, keep: 0.5}}
"""


def test_a_plan_of_several_methods_is_swept_like_one(tmp_path):
    cells = load(tmp_path, ATTENTION_AND_MLP, Sweep).cells(4)
    assert [cell.name for cell in cells] == ["last-01-Tucker_and_SVD", "last-02-Tucker_and_SVD"]
    assert [(r.blocks, r.sites, r.method.name) for r in cells[1].plan_at(("q",)).root] == [
        ("last 2", ("q", "k", "v", "o"), "tucker_heads"), ("last 2", ("gate", "up", "down"), "svd")
    ]  # fmt: skip
    both = load(tmp_path, ATTENTION_AND_MLP + "vary: {method: [zero]}", Sweep).cells(4)
    assert [(cell.depth, cell.label) for cell in both] == [
        (1, "zero"), (1, "Tucker and SVD"), (2, "zero"), (2, "Tucker and SVD")
    ]  # fmt: skip


def test_a_plan_of_a_sweep_names_no_blocks_and_needs_what_its_methods_need(tmp_path):
    with pytest.raises(ValueError, match=r"Tucker and SVD.*blocks '2'.*leave them out"):
        load(tmp_path, ATTENTION_AND_MLP.replace("{sites: [q", "{blocks: 2, sites: [q"), Sweep)
    with pytest.raises(ValueError, match=r"svd_llm needs calibration"):
        load(tmp_path, ATTENTION_AND_MLP.replace("name: svd", "name: svd_llm"), Sweep)


def test_the_model_can_be_named_beside_the_file(tmp_path):
    (tmp_path / "sweep.yaml").write_text(ATTENTION_AND_MLP)
    assert Sweep.load(tmp_path / "sweep.yaml", "other").recipe.model == "other"
    (tmp_path / "recipe.yaml").write_text("model: m")
    (tmp_path / "over.yaml").write_text("base: recipe.yaml")
    assert Sweep.load(tmp_path / "over.yaml", "other").recipe.model == "other"
    assert Recipe.load(tmp_path / "recipe.yaml", "other").model == "other"


def test_directions_with_depths_of_their_own(tmp_path):
    text = "recipe: {model: m}\ndepths: all\ndirections: {last: , first: {depths: [2]}}\nbaselines: {depths: [3]}"
    cells = load(tmp_path, text, Sweep).cells(3)
    assert [(c.direction, c.depth) for c in cells if c.method.name == "mixt"] == [
        ("last", 1), ("last", 2), ("last", 3), ("first", 2)
    ]  # fmt: skip
    assert {c.depth for c in cells if c.method.name != "mixt"} == {3}


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
            "sweep.directions: must be 'last', 'first', 'middle_out', 'middle_to_late' or 'single', got 'lst', did you",
        ),
        ("recipe: {model: m}\ndirections: {last: {depht: all}}", "sweep.directions.last: unknown key 'depht', did you"),
        ("recipe: {model: m}\nbaselines: {methods: [svd]}", "sweep.baselines.methods[0]: must be 'zero' or 'drop_b"),
        (
            "recipe: {model: m, recover: {steps: 1, parameters: lora, text: [{exam: true}]}}\nbaselines: {}",
            "sweep: baselines: recover.parameters 'lora' trains compressed layers alone, and dropped blocks leave",
        ),
        (
            "recipe: {model: m, plan: [{blocks: 0, method: {name: zero}}, {blocks: 1, method: {name: zero}}]}",
            "sweep: the recipe's plan is a template: it must be empty or one rule.",
        ),
        (
            "recipe: {model: m}\nvary: {num_branch: [2]}",
            "sweep: vary.method: unknown key 'num_branch', did you mean '",
        ),
        ("recipe: {model: m}\nvary: {num_branches: [2, 2]}", "sweep: vary: mixt2 is there twice"),
        ("recipe: {model: m}\nvary: {method: [svdd]}", "sweep: vary.method: unknown name 'svdd', did you mean 'svd'?"),
        ("recipe: {model: m}\nvary: {method: [{name: svd_llm, keep: 0.5}]}", "sweep: the method svd_llm needs calibr"),
        (
            "recipe: {model: m}\nvary: {method: [{name: slice_gpt, keep_channels: 0.5}]}",
            "sweep: slice_gpt changes the whole",
        ),
        (
            "recipe: {model: m}\ndirections: {single: {depths: [1]}}",
            "sweep: directions: single takes every block",
        ),
        ("recipe: {model: m}\nblocks: [[1, 1]]", "sweep.blocks: each is a list of blocks from 0, each block once"),
        ("recipe: {model: m}\nsearch: bisect\nblocks: [[1]]", "sweep: search: bisect follows a direction of depths"),
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
    sweep = Sweep.model_validate({"recipe": {"model": "m"}, "directions": {"middle_to_late": {"depths": [3]}}})
    with pytest.raises(ValueError, match="depths asks for 3 blocks; the model has 4, middle_to_late reaches 2"):
        sweep.cells(4)
    with pytest.raises(ValueError, match="blocks lists 4; the model has 4 blocks"):
        Sweep.model_validate({"recipe": {"model": "m"}, "blocks": [[0], [4]]}).cells(4)


def test_every_direction_names_its_blocks_in_order():
    assert schedule("last", 5) == (4, 3, 2, 1, 0) and schedule("first", 4) == (0, 1, 2, 3)
    assert schedule("middle_to_late", 5) == (2, 3, 4) and schedule("middle_to_late", 4) == (2, 3)
    assert schedule("middle_out", 5) == (2, 3, 1, 4, 0) and schedule("middle_out", 4) == (2, 1, 3, 0)
    assert all(sorted(schedule(d, 7)) == list(range(7)) for d in ("last", "first", "middle_out", "single"))


def test_settings_methods_and_blocks_are_varied_together():
    whole = [{"name": "svd", "keep": 0.5}, {"name": "rtn", "bits": 4}]
    data = {"recipe": {"model": "m"}, "vary": {"method": whole}, "directions": ["single", "middle_out"], "depths": [2]}
    names = [cell.name for cell in Sweep.model_validate(data).cells(3)]
    assert names == [*(f"single-0{b}-{m}" for b in range(3) for m in ("svd0.5", "rtn4")),
                     "middle_out-02-svd0.5", "middle_out-02-rtn4"]  # fmt: skip
    plan = [{"sites": ["down"], "method": {"name": "svd", "keep": 0.9}}]
    listed = {"recipe": {"model": "m", "plan": plan}, "vary": {"keep": [0.5, 0.8]}, "blocks": [[3, 4], [5]],
              "baselines": {"methods": ["zero"]}}  # fmt: skip
    cells = Sweep.model_validate(listed).cells(6)
    assert [cell.name for cell in cells] == [
        "blocks-3_4-svd0.5", "blocks-3_4-svd0.8", "blocks-5-svd0.5", "blocks-5-svd0.8", "blocks-3_4-zero",
        "blocks-5-zero",
    ]  # fmt: skip
    assert [cell.where for cell in cells[::2]] == ["3,4", "5", "3,4"]
    assert {cell.method.keep for cell in cells[:4]} == {0.5, 0.8}


def test_a_setting_of_a_method_within_a_method_is_varied():
    plan = [{"method": {"name": "rtn", "bits": 8, "of": {"name": "svd", "keep": 0.5}}}]
    sweep = Sweep.model_validate({"recipe": {"model": "m", "plan": plan}, "vary": {"bits": [4], "of.keep": [0.3, 0.6]}})
    assert [method.of.keep for method, _ in sweep.variants()] == [0.3, 0.6]
    assert [cell.variant for cell in sweep.cells(1)] == ["rtn4-of.keep0.3", "rtn4-of.keep0.6"]
