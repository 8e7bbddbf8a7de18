"""tensormix: make large language models small with structured operators, and see where they break.

    model = AutoModelForCausalLM.from_pretrained(path)
    tensormix.compress(model, tensormix.Recipe.load("recipe.yaml").plan)
    model.save_pretrained(out)             # load it again after `import tensormix.hf`

    tensormix.compress_checkpoint(path, out, plan)      # the same from disk to disk, for a model of any size

Importing this package loads nothing else; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tensormix.version import __version__

_HOMES = {
    "CompressConfig": "tensormix.compression.while_loading",
    "Plan": "tensormix.plan",
    "Recipe": "tensormix.recipe",
    "build_report": "tensormix.report",
    "compress": "tensormix.compression",
    "compress_checkpoint": "tensormix.compression.checkpoint",
    "dense_where_faster": "tensormix.inference.faster",
    "fuse_siblings": "tensormix.inference.siblings",
    "load_model": "tensormix.models",
    "load_tokenizer": "tensormix.models",
    "run_recipe": "tensormix.run",
    "run_sweep": "tensormix.sweep.depths",
    "without_zeros": "tensormix.inference.zeros",
}

if TYPE_CHECKING:
    from tensormix.compression import compress
    from tensormix.compression.checkpoint import compress_checkpoint
    from tensormix.compression.while_loading import CompressConfig
    from tensormix.inference.faster import dense_where_faster
    from tensormix.inference.siblings import fuse_siblings
    from tensormix.inference.zeros import without_zeros
    from tensormix.models import load_model, load_tokenizer
    from tensormix.plan import Plan
    from tensormix.recipe import Recipe
    from tensormix.report import build_report
    from tensormix.run import run_recipe
    from tensormix.sweep.depths import run_sweep

__all__ = [
    "CompressConfig", "Plan", "Recipe", "__version__", "build_report", "compress", "compress_checkpoint",
    "dense_where_faster", "fuse_siblings", "load_model",
    "load_tokenizer", "run_recipe", "run_sweep", "without_zeros",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tensormix' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
