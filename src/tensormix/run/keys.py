"""What is done already: every stage of a run has a key, the hash of what was asked and of all that comes before it.

Asked is also the content of every file that is named, and the code that answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensormix.evaluate import has_answers
from tensormix.models import Sources, fingerprint
from tensormix.plan import Plan
from tensormix.reading import FILES
from tensormix.recipe import Recipe
from tensormix.rows import Row
from tensormix.storage.files import content_digest, read_json
from tensormix.version import code_version


def stage_keys(recipe: Recipe, reference: Path | None, sources: Sources | None = None) -> dict[str, str]:
    """The key of every stage that the recipe asks for: a hash of its settings and of what it builds upon.

    Of a recipe with a budget or a search only "allocate" is known: the others are those of the recipe that it becomes.
    """
    sources = sources or Sources()
    if recipe.is_open:
        return {"allocate": allocation_key(recipe, sources)}
    start = [code_version(), sources[recipe.model].fingerprint, recipe.dtype, recipe.seed]
    keys: dict[str, str] = {}

    def key(stage: str, *upon: Any) -> None:
        settings = stage_settings(recipe, stage)
        if stage in ("evaluate", "direct"):
            del settings["batch_size"], settings["direct"]  # neither changes what is measured
        keys[stage] = key_of(stage, settings, *upon)

    if len(recipe.plan.root):
        if recipe.is_turned:
            key("reparameterise", start, stage_settings(recipe, "compress"))
        upon = [keys["reparameterise"]] if recipe.is_turned else []
        key("compress", start, *([fingerprint(recipe.start)] if recipe.start else []), *upon)
    if recipe.recover is not None:
        other = recipe.recover.distill.teacher if recipe.recover.loss != "lm" else None
        key("recover", start, keys.get("compress"), *([sources[other].fingerprint] if other else []))
    if recipe.evaluate.direct and "compress" in keys and "recover" in keys:
        key("direct", start, keys["compress"])
    model = keys.get("recover", keys.get("compress"))
    key("evaluate", start, model)
    if recipe.diagnose is not None and (has_answers(recipe.evaluate) or recipe.diagnose.run):
        compared = read_json(reference / "diagnose.json")["key"] if reference else None
        key("diagnose", keys["evaluate"], compared)
    if recipe.profile is not None and model is not None:
        key("profile", start, model)
    return keys


def allocation_key(recipe: Recipe, sources: Sources | None = None) -> str:
    """The key of what a budget or a search becomes: a hash of it, of the plan, and of what both are decided on."""
    source = fingerprint(recipe.start or (sources or Sources())[recipe.model])
    start = [code_version(), source, recipe.dtype, recipe.seed]
    return key_of("allocate", stage_settings(recipe, "allocate"), start)


def key_of(*upon: Any) -> str:
    """A hash of plain data and of what the files hold that it names."""
    text = json.dumps([*upon, {name: content_digest(Path(name)) for name in named_files(upon)}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def named_files(data: Any) -> Iterator[str]:
    """Every file that settings name, as plain data."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if key in FILES and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from named_files(value)


def stage_settings(recipe: Recipe, stage: str) -> Any:
    """What the recipe says to one stage, as plain data."""
    whole = json.loads(recipe.model_dump_json())
    if stage == "allocate" and recipe.search is not None:
        asked = whole["evaluate"]["exam"] or whole["evaluate"]["perplexity"][0]
        return {"scored_on": asked, **{name: whole[name] for name in ("model", "dtype", "plan", "search")}}
    if stage == "allocate":
        return {name: whole[name] for name in ("model", "dtype", "plan", "calibration", "budget")}
    if stage == "compress":
        return {name: whole[name] for name in ("model", "dtype", "plan", "calibration")}
    return whole["evaluate" if stage == "direct" else stage]


def dense_recipe(recipe: Recipe) -> Recipe:
    """The same examination of the untouched model."""
    names = ("budget", "search", "start", "reparameterise", "recover", "calibration", "profile")
    nothing: dict[str, Any] = dict.fromkeys(names)
    return recipe.model_copy(update={"plan": Plan(()), **nothing})


def with_allocation(recipe: Recipe, folder: Path, sources: Sources | None = None) -> Recipe | None:
    """A recipe with a budget or a search as the recipe with the plan that it became; None if that is not known yet."""
    if not recipe.is_open:
        return recipe
    if not is_done(folder, "allocate", {"allocate": allocation_key(recipe, sources)}):
        return None
    plan = Plan.model_validate(read_json(folder / "allocate.json")["plan"])
    return recipe.model_copy(update={"plan": plan, "budget": None, "search": None})


def is_done(folder: Path, stage: str, keys: dict[str, str]) -> bool:
    """Whether a stage's file carries its key, and the model that it made is still there or no longer needed."""
    file = folder / f"{stage}.json"
    if not file.exists() or read_json(file)["key"] != keys[stage]:
        return False
    if stage == "reparameterise":
        return (folder / "rewritten").exists() or is_done(folder, "compress", keys)
    if stage == "compress":
        return (folder / "compressed").exists() or ("recover" in keys and is_done(folder, "recover", keys))
    return stage != "recover" or (folder / "recovered").exists()


def stage_rows(folder: Path, stage: str) -> list[Row]:
    return read_json(folder / f"{stage}.json")["rows"]
