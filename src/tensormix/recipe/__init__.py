"""Everything that defines a run, a sweep or a comparison: plain frozen data, read from YAML."""

from tensormix.recipe.recipe import MixtureFile, Recipe
from tensormix.recipe.sweep import Baselines, Cell, Direction, Sweep

__all__ = ["Baselines", "Cell", "Direction", "MixtureFile", "Recipe", "Sweep"]
