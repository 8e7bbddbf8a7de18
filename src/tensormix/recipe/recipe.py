"""Everything that defines a run: plain frozen data, read from YAML."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tensormix.diagnose.table import Diagnose
from tensormix.methods import METHODS, Auto, with_sizes
from tensormix.plan import Plan
from tensormix.reading import Model, is_path, placed_files, placed_path, read_yaml, validated
from tensormix.settings import (
    Budget,
    Calibration,
    Evaluate,
    Profile,
    Recover,
    Reparameterise,
    Search,
    Settings,
    Source,
    is_list,
    is_mapping,
)


class Recipe(Settings):
    """One run: a model, what is done to it, and what is measured afterwards.

    Raises ValueError, on construction, if something needs calibration and there is none, or a budget and the plan
    both say how large something is, or if a search cannot be one.
    """

    model: str  # a folder or a file of weights, relative to the recipe, or a Hub id
    start: str | None = None  # a compressed and recovered form of it to go on from; what is compressed there stays
    seed: int = Field(default=0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"  # loaded and trained in
    plan: Plan = Plan(())  # empty: the model stays dense
    budget: Budget | None = None  # decides the sizes of the plan's methods, which then leave theirs out
    search: Search | None = None  # decides which sites of a laser plan are reduced, and how far, by trying
    calibration: Calibration | None = None
    reparameterise: Reparameterise | None = None  # before anything is compressed: other weights, the same function
    recover: Recover | None = None  # absent: no training
    evaluate: Evaluate = Evaluate()
    diagnose: Diagnose | None = Diagnose()  # null: not measured
    profile: Profile | None = Profile()  # null: not measured

    @model_validator(mode="before")
    @classmethod
    def _sizes_left_open(cls, data: object) -> object:
        if not is_mapping(data) or (data.get("budget") is None and data.get("search") is None):
            return data
        if not is_list(rules := data.get("plan")):
            return data
        rules = [{**r, "method": with_sizes(r.get("method"))} if is_mapping(r) else r for r in rules]
        return {**data, "plan": rules}

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.budget is None:
            return self
        if not self.plan.root:
            raise ValueError("a budget needs a plan: it says how large the methods of its rules are")
        for number, rule in enumerate(self.plan.root):
            method = rule.method
            if method.num_chosen is not None:
                raise ValueError(f"plan[{number}]: the budget chooses the blocks: leave out choose and count")
            inner = getattr(method, "of", None) or method
            if inner.size and getattr(inner, inner.size) != inner.largest:
                given = f"{inner.size}={getattr(inner, inner.size)}"
                raise ValueError(f"plan[{number}]: {given} and a budget cannot both hold: leave out one of them")
        if self.budget.by in ("sensitivity", "learned") and self.calibration is None:
            raise ValueError(
                f"budget.by {self.budget.by!r} is measured on calibration text, and there is no such section"
            )
        return self

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        rule = self.plan.choice
        if rule is None:
            return self
        if self.budget is None:
            raise ValueError("auto chooses within a budget, and there is no such section; give one with keep")
        if self.calibration is None:
            raise ValueError("auto measures its candidates on calibration text, and there is no such section")
        assert isinstance(rule.method, Auto)
        rule.method.check_budget(self.budget.by, self.budget.measure)
        return self

    @model_validator(mode="after")
    def _one_search(self) -> Self:
        if self.search is None:
            return self
        if self.budget is not None:
            raise ValueError("budget and search both decide the sizes of the plan: leave out one of them")
        if self.start is not None:
            raise ValueError("a search begins with the dense model: leave out start")
        if not self.plan.root:
            raise ValueError("a search needs a plan: its rules say which sites are tried")
        for number, rule in enumerate(self.plan.root):
            method, size = rule.method, str(rule.method.size)
            if method.search is None:
                known = ", ".join(name for name, cls in METHODS.items() if cls.search is not None)
                raise ValueError(f"plan[{number}]: a search tries {known}, and the method is {method.name}")
            if getattr(method, size) != method.largest:
                given = f"{size}={getattr(method, size)}"
                raise ValueError(f"plan[{number}]: {given} and a search cannot both hold: search.{size} has them all")
        texts = self.evaluate.perplexity
        if self.evaluate.exam is None and not texts:
            raise ValueError("a search scores on evaluate.exam or else on a text of evaluate.perplexity; give one")
        if self.evaluate.exam is None and texts[0].num_tokens is None:
            raise ValueError(
                "a search without evaluate.exam scores on the tokens that evaluate.perplexity does not read: "
                "give its first text num_tokens"
            )
        return self

    @property
    def is_open(self) -> bool:
        """Whether the plan that is run is still to be decided, by a budget or a search."""
        return self.budget is not None or self.search is not None

    @property
    def is_turned(self) -> bool:
        """Whether the dense model is rewritten first: asked for, and there are methods to do it for."""
        return self.reparameterise is not None and any(rule.method.is_differentiable for rule in self.plan.root)

    @model_validator(mode="after")
    def _turnable(self) -> Self:
        if self.reparameterise is None:
            return self
        if self.start is not None:
            raise ValueError("reparameterise rewrites the dense model: leave out start")
        if self.calibration is None:
            raise ValueError("reparameterise learns on calibration text, and there is no such section")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(
                f"reparameterise rewrites every weight, which dtype {self.dtype} would round too coarsely: "
                "give float32 or float64"
            )
        if self.recover is not None and (self.recover.loss == "local_then_kl" or self.recover.distill.hidden):
            raise ValueError(
                "reparameterise turns the hidden states, so those of the dense model cannot be learned from: "
                "give recover the loss kl or lm, and no distill.hidden"
            )
        turned = (
            {"residual_stream", "compress_sensitivity"} & {d.name for d in self.diagnose.run} if self.diagnose else ()
        )
        if turned:
            raise ValueError(
                f"reparameterise turns the hidden states, so {', '.join(sorted(turned))} would compare two bases: "
                "leave it out of diagnose.run"
            )
        if self.plan.root and not self.is_turned:
            named = ", ".join(dict.fromkeys(rule.method.name for rule in self.plan.root))
            raise ValueError(
                "reparameterise looks for bases of operators that are fitted to linear layers by their Gram matrix, "
                f"such as mixt, and the plan has {named}"
            )
        return self

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        for rule in self.plan.root:
            if rule.method.needs and self.calibration is None:
                raise ValueError(f"the method {rule.method.name} needs calibration, and there is no such section")
        return self

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> Self:
        """The recipe in a YAML file; relative paths in it are taken from its folder. `model` replaces that of the file.

        Raises ValueError if the file is missing, is no YAML, or holds a wrong key or value (one sentence, with the
        nearest right key).
        """
        data = read_yaml(Path(path))
        if "recipe" in data or "base" in data:
            verb = "compare" if "budgets" in data else "sweep"
            raise ValueError(f"{path} is not one recipe but a file of many runs: use it with tensormix {verb}")
        return validated(cls, _placed_recipe(data, Path(path).parent, model), "recipe")

    @property
    def digest(self) -> str:
        """A short hash of everything that the recipe says."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class MixtureFile(Settings):
    """A file that a recipe names as recover.text: sources of text with their weights, for many recipes."""

    sources: tuple[Source, ...] = Field(min_length=1)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Relative paths in it are taken from its folder. Raises ValueError as `Recipe.load` does."""
        return validated(cls, placed_files(read_yaml(Path(path)), Path(path).parent), "mixture")


def load_with_recipe(cls: type[Model], path: Path, where: str, model: str | None) -> Model:
    """What a YAML file says whose recipe is written in it, as `recipe`, or in a file of its own, as `base`.

    `model` replaces that of the recipe. Raises ValueError if both are given, and as `Recipe.load` does.
    """
    data = read_yaml(path)
    if "model" in data and "plan" in data:
        raise ValueError(
            f"{path} is one recipe, not a {where}: use it with tensormix run, or name it as base in a file of a {where}"
        )
    if data.get("base") is not None and data.get("recipe") is not None:
        raise ValueError(f"{where}: give base or recipe, not both")
    if isinstance(data.get("base"), str):
        base = placed_path(data["base"], path.parent)
        data |= {"base": base, "recipe": Recipe.load(base, model)}
    elif isinstance(data.get("recipe"), dict):
        data["recipe"] = _placed_recipe(data["recipe"], path.parent, model)
    if isinstance(data.get("family"), list):
        known = [isinstance(model, str) and is_path(model, path.parent) for model in data["family"]]
        pairs = zip(data["family"], known, strict=True)
        data["family"] = [placed_path(model, path.parent) if here else model for model, here in pairs]
    return validated(cls, data, where)


def _placed_recipe(data: dict[str, object], folder: Path, model: str | None) -> dict[str, object]:
    """The same data with relative paths taken from `folder`; a model that is no folder there is a Hub id."""
    placed: dict[str, object] = placed_files(data, folder)
    for key in ("model", "start"):
        if isinstance(name := placed.get(key), str) and is_path(name, folder):
            placed[key] = placed_path(name, folder)
    if model is not None:
        placed["model"] = model
    recover = placed.get("recover")
    if is_mapping(recover):
        if isinstance(text := recover.get("text"), str):
            recover["text"] = MixtureFile.load(placed_path(text, folder)).model_dump(exclude_defaults=True)["sources"]
        distill = recover.get("distill")
        if is_mapping(distill):
            if isinstance(teacher := distill.get("teacher"), str) and is_path(teacher, folder):
                distill["teacher"] = placed_path(teacher, folder)
            if isinstance(cache := distill.get("cache"), str):
                distill["cache"] = placed_path(cache, folder)
    return placed
