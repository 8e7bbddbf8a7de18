"""Everything that defines a run, a sweep or a comparison: plain frozen data, read from YAML."""

from tensormix.recipe.cell import Cell, Direction, schedule
from tensormix.recipe.recipe import MixtureFile, Recipe
from tensormix.recipe.sweep import Baselines, Sweep

__all__ = ["Baselines", "Cell", "Direction", "MixtureFile", "Recipe", "Sweep", "schedule"]
