"""The recipes of the repository can be read, and what they measure on is not what they learn from."""

from pathlib import Path

import pytest
import yaml

from tensormix.recipe import Recipe, Sweep
from tensormix.recipe.comparison import Comparison

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
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
