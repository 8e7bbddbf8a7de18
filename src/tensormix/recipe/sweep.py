"""A sweep: many runs of one recipe that differ in how many blocks are compressed, from which end, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tensormix.recipe.recipe import Recipe, load_with_recipe
from tensormix.settings import Settings

Direction = Literal["last", "first"]


Baseline = Literal["zero", "drop_blocks"]


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
    def _one_start(self) -> Self:
        if self.warm_start and self.recipe is not None and self.recipe.reparameterise is not None:
            raise ValueError(
                "warm_start goes on from a recovered model and reparameterise from the dense one: leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _baselines_can_learn(self) -> Self:
        recover = self.recipe.recover if self.recipe is not None else None
        if self.baselines is None or recover is None or recover.parameters == "all":
            return self
        if "drop_blocks" in self.baselines.methods:
            raise ValueError(
                f"baselines: recover.parameters {recover.parameters!r} trains compressed layers alone, and dropped "
                "blocks leave none: give baselines.methods [zero], or parameters all"
            )
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
