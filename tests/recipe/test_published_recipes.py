"""The recipes of the repository can be read, and what they measure on is not what they learn from."""

from pathlib import Path

import pytest
import yaml

from tensormix.methods import Mobe, TdMoe
from tensormix.recipe import Recipe, Sweep
from tensormix.recipe.comparison import Comparison
from tensormix.run.check import check

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_can_be_read(path):
    content = yaml.safe_load(path.read_text())
    kind = Comparison if "methods" in content else Sweep if "recipe" in content else Recipe
    assert kind.load(path).model_dump()


def test_the_best_recipe_is_judged_on_stories_that_it_never_reads():
    recipe = Recipe.load(RECIPES / "stories260k_narrow.yaml")
    judged = recipe.evaluate.perplexity[0].text
    assert recipe.recover is not None and recipe.calibration is not None
    for read in (recipe.calibration.text, *recipe.recover.text):
        assert read.file == judged.file
        assert judged.num_documents is not None and judged.num_documents <= read.skip_documents


# Recipe -> numbers of the dense model, and those of one site of each role in the last compressed block.
COUNTS = {
    "llama2_7b_tucker_heads": (6_738_415_616, {"q": 279_048, "k": 0, "v": 0, "o": 0}),
    "llama2_7b_tensor_train": (6_738_415_616, dict.fromkeys(("gate", "up", "down"), 113_108)),
    "llama2_7b_laser": (
        6_738_415_616,
        {**dict.fromkeys("qkvo", 1024 * 8192), **dict.fromkeys(("gate", "up", "down"), 1024 * 15104)},
    ),
    "llama2_7b_per_head_tt": (6_738_415_616, dict.fromkeys("qkvo", 32 * 99_584)),
    "gpt_j_6b_tensor_train": (6_050_882_784, {"up": 123_216, "down": 123_216}),
    "gpt_oss_20b_td_moe_preserve": (20_914_757_184, {"gate_up": 32 * 1720 * 2664 + 5760 * 1720 + 2880 * 2664}),
    "gpt_oss_20b_td_moe_compress": (
        20_914_757_184,
        {"gate_up": 20 * 2496 * 2880 + 5760 * 2496 + 2880 * 2880 + 32 * 20},
    ),
    "qwen3_30b_a3b_mobe": (30_532_122_624, {"gate_up": 128 * 1536 * 768 + 16 * 768 * 2048 + 128 * 16}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_settings_count_to_the_digit(name):
    dense, of_roles = COUNTS[name]
    result = check(Recipe.load(RECIPES / "published" / f"{name}.yaml"))
    assert result["dense"]["parameters"] == dense
    last = max(row["block"] for row in result["sites"])
    assert {row["role"]: row["parameters"] for row in result["sites"] if row["block"] == last} == of_roles


def test_every_published_recipe_is_counted():
    assert {path.stem for path in (RECIPES / "published").glob("*.yaml")} == set(COUNTS)


def test_stacks_of_one_projection_count_as_published():
    """Gate and up apart, as the papers have them."""
    budget = 6 * 32 * 2880**2 // 10
    preserve = TdMoe(ranks=(32, 1720, 2664)).empty(32, 2880, 2880)
    compress = TdMoe(experts="compress", ranks=(20, 2496, 2880)).empty(32, 2880, 2880)
    assert (preserve.num_params, compress.num_params) == (budget, budget + 640)
    for num_bases, ratio in ((16, 0.50), (32, 0.625), (54, 0.80)):
        made = Mobe(num_bases=num_bases, rank=768, mirrored=False).empty(128, 2048, 768)
        assert made.num_params / (128 * 2048 * 768) == pytest.approx(ratio, abs=4e-3)
