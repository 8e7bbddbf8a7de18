"""Dense models of the family of a sweep's own: the trend of loss against parameters that its cells are held against.

family/NAME/      the run of one of them: its loss on the sweep's first text, which is all that the trend asks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tensormix.diagnose import scaling_rows
from tensormix.models import skeleton
from tensormix.profile import num_parameters
from tensormix.recipe import Recipe, Sweep
from tensormix.rows import Row
from tensormix.run.keys import dense_recipe, stage_rows
from tensormix.run.run import run_recipe
from tensormix.settings import Evaluate


def members(sweep: Sweep, folder: Path) -> dict[Path, Recipe]:
    """The recipe of each other dense model, by the folder of its run."""
    assert sweep.recipe is not None
    own = dense_recipe(sweep.recipe)
    asked = Evaluate(exam=None, perplexity=own.evaluate.perplexity[:1], batch_size=own.evaluate.batch_size)
    own = own.model_copy(update={"diagnose": None, "evaluate": asked})
    recipes = [own.model_copy(update={"model": model}) for model in sweep.family]
    return {folder / "family" / Path(recipe.model).name: recipe for recipe in recipes}


def run_family(sweep: Sweep, folder: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Examine every other dense model; what is finished is not repeated."""
    for where, recipe in members(sweep, folder).items():
        run_recipe(recipe, where, progress=progress)


def family_rows(sweep: Sweep, folder: Path, cells: Sequence[Row]) -> list[Row]:
    """The trend of the dense models and every profiled cell beside it (arXiv 2605.25344, Fig. 1c).

    The loss is that of the first perplexity text. None before the sweep's own dense model and one more are examined.
    """
    if not sweep.family or sweep.recipe is None:
        return []
    models = {folder / "dense": sweep.recipe, **members(sweep, folder)}
    done = {where: recipe for where, recipe in models.items() if (where / "evaluate.json").exists()}
    if folder / "dense" not in done or len(done) < 2:
        return []
    dense = [
        {"model": Path(recipe.model).name, "parameters": num_parameters(skeleton(recipe.model)), "loss": _loss(where)}
        for where, recipe in done.items()
    ]
    compressed = [
        {"model": row["cell"], "parameters": parameters, "loss": _loss(folder / row["folder"])}
        for row in cells
        if (parameters := _parameters(folder / row["folder"])) is not None
    ]
    return scaling_rows(dense, compressed)


def _loss(folder: Path) -> float:
    return next(row["loss"] for row in stage_rows(folder, "evaluate") if row["kind"] == "perplexity")


def _parameters(folder: Path) -> int | None:
    """Of the compressed model; None where it was not examined or not profiled."""
    if not (folder / "profile.json").exists() or not (folder / "evaluate.json").exists():
        return None
    rows = stage_rows(folder, "profile")
    return next(row["parameters"] for row in rows if row["kind"] == "resources" and row["model"] == "compressed")
