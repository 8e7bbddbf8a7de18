"""Everything that defines a run, and a sweep of runs: plain frozen data, read from YAML."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from tensormix.diagnose.table import Diagnose
from tensormix.methods import JointMethod, Laser, LinearMethod, with_sizes
from tensormix.plan import Plan
from tensormix.recipe.explain import explain
from tensormix.settings import Budget, Calibration, Evaluate, Profile, Recover, Search, Settings, Source

Model = TypeVar("Model", bound=BaseModel)
Direction = Literal["last", "first"]
Baseline = Literal["zero", "drop_blocks"]
FILES = ("file", "examples")  # keys of paths that are taken from the recipe's folder


class Recipe(Settings):
    """One run: a model, what is done to it, and what is measured afterwards.

    Raises ValueError, on construction, if something needs calibration and there is none, or a budget and the plan
    both say how large something is, or if a search cannot be one.
    """

    model: str  # a folder, relative to the recipe, or a Hub id
    start: str | None = None  # a compressed and recovered form of it to go on from; what is compressed there stays
    seed: int = Field(default=0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"  # loaded and trained in
    plan: Plan = Plan(())  # empty: the model stays dense
    budget: Budget | None = None  # decides the sizes of the plan's methods, which then leave theirs out
    search: Search | None = None  # decides which sites of a laser plan are reduced, and how far, by trying
    calibration: Calibration | None = None
    recover: Recover | None = None  # absent: no training
    evaluate: Evaluate = Evaluate()
    diagnose: Diagnose | None = Diagnose()  # null: not measured
    profile: Profile | None = Profile()  # null: not measured

    @model_validator(mode="before")
    @classmethod
    def _sizes_left_open(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("plan"), list | tuple):
            return data
        if data.get("budget") is None and data.get("search") is None:
            return data
        rules = [{**r, "method": with_sizes(r.get("method"))} if isinstance(r, dict) else r for r in data["plan"]]
        return {**data, "plan": rules}

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.budget is None:
            return self
        if not self.plan.root:
            raise ValueError("a budget needs a plan: it says how large the methods of its rules are")
        for number, rule in enumerate(self.plan.root):
            method = rule.method
            if getattr(method, "num_chosen", None) is not None:
                raise ValueError(f"plan[{number}]: the budget chooses the blocks: leave out choose and count")
            inner = getattr(method, "of", None) or method
            if (
                isinstance(inner, LinearMethod | JointMethod)
                and inner.size
                and getattr(inner, inner.size) != inner.largest
            ):
                given = f"{inner.size}={getattr(inner, inner.size)}"
                raise ValueError(f"plan[{number}]: {given} and a budget cannot both hold: leave out one of them")
        if self.budget.by in ("sensitivity", "learned") and self.calibration is None:
            raise ValueError(
                f"budget.by {self.budget.by!r} is measured on calibration text, and there is no such section"
            )
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
            if not isinstance(rule.method, Laser):
                raise ValueError(f"plan[{number}]: a search tries laser, and the method is {rule.method.name}")
            if rule.method.keep_rank != Laser.largest:
                given = f"keep_rank={rule.method.keep_rank}"
                raise ValueError(
                    f"plan[{number}]: {given} and a search cannot both hold: search.keep_rank has them all"
                )
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

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        for rule in self.plan.root:
            if rule.method.needs and self.calibration is None:
                raise ValueError(f"the method {rule.method.name} needs calibration, and there is no such section")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The recipe in a YAML file; relative paths in it are taken from its folder.

        Raises ValueError if the file is missing, is no YAML, or holds a wrong key or value (one sentence, with the
        nearest right key).
        """
        return _validated(cls, _placed_recipe(_read(Path(path)), Path(path).parent), "recipe")

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
        return _validated(cls, _placed_files(_read(Path(path)), Path(path).parent), "mixture")


class Depths(Settings):
    """How deep one direction of a sweep goes."""

    depths: Literal["all"] | tuple[int, ...] = "all"  # numbers of compressed blocks

    @field_validator("depths", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        return checked_depths(value)


class Baselines(Settings):
    """What compression has to beat: the same blocks zeroed or dropped, with the same recovery."""

    methods: tuple[Baseline, ...] = ("zero", "drop_blocks")
    depths: Literal["all"] | tuple[int, ...] | None = None  # without it those of the direction
    directions: tuple[Direction, ...] = ("last",)

    @field_validator("depths", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        return None if value is None else checked_depths(value)


class Cell(Settings):
    """One run of a sweep: `method` on the `depth` first or last blocks."""

    depth: int  # number of compressed blocks
    direction: Direction
    method: Literal["mixt", "zero", "drop_blocks"]
    num_branches: int | None = None  # of mixt


class Sweep(Settings):
    """Many runs of one recipe that differ in how many blocks are compressed, from which end, and how.

    The plan of the recipe is the template: it is empty, or has one rule with a `mixt` method, whose `blocks` and
    `num_branches` are replaced in every cell.
    """

    base: str | None = None  # a recipe file, relative to the sweep's
    recipe: Recipe | None = None  # the same, written here; `load` fills it in from `base`
    num_branches: tuple[int, ...] = Field(default=(4,), min_length=1)
    depths: Literal["all"] | tuple[int, ...] = "all"  # numbers of compressed blocks, for all directions
    directions: dict[Direction, Depths | None] = Field(default={"last": None}, min_length=1)  # with depths of their own
    baselines: Baselines | None = None
    search: Literal["scan", "bisect"] = "scan"  # every depth, or only as many as finding the boundary takes
    warm_start: bool = False  # of a scan: every depth goes on from the recovered model of the depth before
    family: tuple[str, ...] = ()  # other dense models of the family, for the trend of loss against parameters

    @field_validator("depths", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        return checked_depths(value)

    @field_validator("directions", mode="before")
    @classmethod
    def _as_mapping(cls, value: Any) -> Any:
        return dict.fromkeys(value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_recipe(self) -> Self:
        if self.base is None and self.recipe is None:
            raise ValueError("needs base (the path of a recipe) or recipe (the recipe itself)")
        rules = self.recipe.plan.root if self.recipe is not None else ()
        if len(rules) > 1 or any(rule.method.name != "mixt" for rule in rules):
            raise ValueError("the recipe's plan is a template: it must be empty or one rule with the method mixt")
        return self

    @model_validator(mode="after")
    def _family_has_a_loss(self) -> Self:
        if self.family and self.recipe is not None and not self.recipe.evaluate.perplexity:
            raise ValueError("family: the trend is of the loss of a text, and evaluate.perplexity names none")
        names = [Path(model).name for model in self.family]
        if len(set(names)) < len(names):
            raise ValueError(f"family: the models must differ in their last names, got {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> Self:
        if self.search == "scan":
            return self
        listed = [self.depths, *(own.depths for own in self.directions.values() if own)]
        listed += [self.baselines.depths] if self.baselines and self.baselines.depths else []
        if any(depths != "all" for depths in listed):
            raise ValueError("search: bisect chooses the depths by itself: leave out depths, or give scan")
        if self.warm_start:
            raise ValueError("search: bisect jumps between depths, so none can go on from the one before (warm_start)")
        if self.recipe is not None and self.recipe.evaluate.exam is None:
            raise ValueError("search: bisect compares accuracies, so it needs evaluate.exam")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The sweep in a YAML file, its recipe included. Raises ValueError as `Recipe.load` does."""
        return load_with_recipe(cls, Path(path), "sweep")

    def cells(self, num_blocks: int) -> tuple[Cell, ...]:
        """Every run of the sweep on a model with `num_blocks` blocks, in order.

        Raises ValueError if a depth is more than that.
        """
        cells: dict[Cell, None] = {}  # in order, without repeats
        for direction, own in self.directions.items():
            for depth in _resolved(own.depths if own else self.depths, num_blocks):
                for num_branches in self.num_branches:
                    cells[Cell(depth=depth, direction=direction, method="mixt", num_branches=num_branches)] = None
        if self.baselines is not None:
            for direction in self.baselines.directions:
                own = self.directions.get(direction)
                depths = self.baselines.depths or (own.depths if own else self.depths)
                for depth in _resolved(depths, num_blocks):
                    for method in self.baselines.methods:
                        cells[Cell(depth=depth, direction=direction, method=method)] = None
        return tuple(cells)


def checked_depths(value: Any) -> Any:
    """`value` if it is "all" or a list of positive integers, without repeats. Raises ValueError otherwise."""
    if value == "all":
        return value
    depths = value if isinstance(value, list | tuple) else [value]
    if not depths or any(not isinstance(depth, int) or isinstance(depth, bool) or depth < 1 for depth in depths):
        raise ValueError(f"depths must be 'all' or a list of numbers of blocks from 1, got {value!r}")
    return tuple(dict.fromkeys(depths))


def _resolved(depths: Literal["all"] | tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    if depths == "all":
        return tuple(range(1, num_blocks + 1))
    if max(depths) > num_blocks:
        raise ValueError(f"sweep: depths asks for {max(depths)} blocks; the model has {num_blocks}")
    return depths


def load_with_recipe(cls: type[Model], path: Path, where: str) -> Model:
    """What a YAML file says whose recipe is written in it, as `recipe`, or in a file of its own, as `base`.

    Raises ValueError if both are given, and as `Recipe.load` does.
    """
    data = _read(path)
    if data.get("base") is not None and data.get("recipe") is not None:
        raise ValueError(f"{where}: give base or recipe, not both")
    if isinstance(data.get("base"), str):
        base = _placed(data["base"], path.parent)
        data |= {"base": base, "recipe": Recipe.load(base)}
    elif isinstance(data.get("recipe"), dict):
        data["recipe"] = _placed_recipe(data["recipe"], path.parent)
    if isinstance(data.get("family"), list):
        known = [isinstance(model, str) and _is_path(model, path.parent) for model in data["family"]]
        pairs = zip(data["family"], known, strict=True)
        data["family"] = [_placed(model, path.parent) if here else model for model, here in pairs]
    return _validated(cls, data, where)


def _validated(cls: type[Model], data: dict[str, Any], where: str) -> Model:
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, cls, data, where)) from None


def _placed(path: str, folder: Path) -> str:
    return str(folder.resolve() / Path(path).expanduser())


def _placed_recipe(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same data with relative paths taken from `folder`; a model that is no folder there is a Hub id."""
    placed = _placed_files(data, folder)
    for key in ("model", "start"):
        if isinstance(placed.get(key), str) and _is_path(placed[key], folder):
            placed[key] = _placed(placed[key], folder)
    recover = placed.get("recover")
    if isinstance(recover, dict):
        if isinstance(recover.get("text"), str):
            recover["text"] = MixtureFile.load(_placed(recover["text"], folder)).model_dump(exclude_defaults=True)[
                "sources"
            ]
        distill = recover.get("distill")
        if (
            isinstance(distill, dict)
            and isinstance(distill.get("teacher"), str)
            and _is_path(distill["teacher"], folder)
        ):
            distill["teacher"] = _placed(distill["teacher"], folder)
        if isinstance(distill, dict) and isinstance(distill.get("cache"), str):
            distill["cache"] = _placed(distill["cache"], folder)
    return placed


def _is_path(model: str, folder: Path) -> bool:
    return model.startswith((".", "~")) or (folder / model).exists()


def _placed_files(data: Any, folder: Path) -> Any:
    if isinstance(data, dict):
        return {
            key: _placed(value, folder) if key in FILES and isinstance(value, str) else _placed_files(value, folder)
            for key, value in data.items()
        }
    return [_placed_files(item, folder) for item in data] if isinstance(data, list) else data


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(data).__name__}")
    return data
