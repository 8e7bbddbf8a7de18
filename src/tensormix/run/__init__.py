"""Recipes carried out: one run, a sweep of them, a comparison, and what can be told before.

Each name is loaded when it is first used: `check` needs none of what trains and measures.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tensormix.rows import STAGES

if TYPE_CHECKING:
    from tensormix.run.keys import allocation_key, dense_recipe, is_done, stage_keys, stage_rows
    from tensormix.run.run import run_recipe

__all__ = ["STAGES", "allocation_key", "dense_recipe", "is_done", "run_recipe", "stage_keys", "stage_rows"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tensormix.run' has no attribute {name!r}")
    return getattr(importlib.import_module("tensormix.run.run" if name == "run_recipe" else "tensormix.run.keys"), name)
