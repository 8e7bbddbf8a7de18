"""Recipes carried out: one run, a sweep of them, a comparison, and what can be told before."""

from tensormix.run.run import (
    STAGES,
    allocation_key,
    dense_recipe,
    is_done,
    run_recipe,
    stage_keys,
    stage_rows,
)

__all__ = [
    "STAGES",
    "allocation_key",
    "dense_recipe",
    "is_done",
    "run_recipe",
    "stage_keys",
    "stage_rows",
]
