"""Recipes carried out: one run, a sweep of them, a comparison, and what can be told before."""

from tensormix.rows import STAGES
from tensormix.run.keys import (
    allocation_key,
    dense_recipe,
    is_done,
    stage_keys,
    stage_rows,
)
from tensormix.run.run import run_recipe

__all__ = [
    "STAGES",
    "allocation_key",
    "dense_recipe",
    "is_done",
    "run_recipe",
    "stage_keys",
    "stage_rows",
]
