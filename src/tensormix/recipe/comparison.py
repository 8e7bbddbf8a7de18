"""What a comparison asks for: methods times budgets times seeds, from one recipe; plain frozen data, read from YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tensormix.methods import with_sizes
from tensormix.plan import AnyMethod
from tensormix.recipe.recipe import Recipe, load_with_recipe
from tensormix.settings import Budget, Settings

Way = Literal["uniform", "spectrum", "greedy", "sensitivity", "learned"]
NULLS = ("zero", "mean_output", "drop_blocks")  # what every method has to beat
_LABEL = re.compile(r"[A-Za-z0-9_+.]+")


class Contender(Settings):
    """One method of a comparison."""

    method: AnyMethod  # without its size, which the budgets decide
    by: Way | None = None  # how a budget is divided among the sites; without it as the comparison says

    @field_validator("method", mode="before")
    @classmethod
    def _size_left_open(cls, value: object) -> object:
        return with_sizes(value)


class ComparedCell(Settings):
    """One run of a comparison."""

    method: str  # label of a contender
    keep: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.keep:g}-s{self.seed}"


class Comparison(Settings):
    """Every method at every budget with every seed; all else, calibration and recovery included, as the recipe says.

    The null baselines are always among them: sites zeroed, sites replaced by their mean output, blocks dropped, each
    where the model loses least until the budget is met.
    """

    base: str | None = None  # a recipe file, relative to the comparison's
    recipe: Recipe | None = None  # the same, written here; `load` fills it in from `base`
    methods: dict[str, Contender] = Field(min_length=1)  # label -> method
    budgets: tuple[float, ...] = Field(min_length=1)  # `keep` of each
    of: Literal["bits", "parameters", "macs", "bytes_per_token"] = "bits"
    over: Literal["sites", "model"] = "sites"
    by: Way = "uniform"  # of the methods that do not say it themselves
    measure: Literal["kl", "loss", "angle"] = "kl"  # of sensitivity, also for the null baselines
    tokens: int = Field(default=512, ge=2)  # of the calibration text, on which sensitivity is measured for each site
    levels: int = Field(default=12, ge=1)  # sizes of a site that are fitted, where only a fit tells the error
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)  # of the calibration text and of the recovery

    @field_validator("methods")
    @classmethod
    def _labelled(cls, methods: dict[str, Contender]) -> dict[str, Contender]:
        for label in methods:
            if not _LABEL.fullmatch(label) or label == "dense":
                raise ValueError(f"a label is made of letters, digits, _ + . and is not 'dense', got {label!r}")
        return methods

    @field_validator("budgets", "seeds")
    @classmethod
    def _once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"each must stand there once, got {list(values)}")
        return values

    @model_validator(mode="after")
    def _one_recipe(self) -> Self:
        if self.recipe is None:
            if self.base is None:
                raise ValueError("needs base (the path of a recipe) or recipe (the recipe itself)")
            return self
        if self.recipe.plan.root or self.recipe.budget is not None:
            raise ValueError("the recipe's plan and budget are made by the comparison: leave them out")
        if self.recipe.calibration is None:
            raise ValueError("the recipe needs calibration: the null baselines are chosen by what they do on its text")
        for cell in self.cells():
            self.recipe_of(cell)
        return self

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> Self:
        """The comparison in a YAML file, its recipe included; `model` replaces that of the recipe.

        Raises ValueError as `Recipe.load` does.
        """
        return load_with_recipe(cls, Path(path), "comparison", model)

    @property
    def contenders(self) -> dict[str, Contender]:
        """The methods, and the null baselines that are not among them."""
        nulls = {name: Contender.model_validate({"method": {"name": name}, "by": "sensitivity"}) for name in NULLS}
        return {**self.methods, **{name: null for name, null in nulls.items() if name not in self.methods}}

    def cells(self) -> tuple[ComparedCell, ...]:
        return tuple(
            ComparedCell(method=label, keep=keep, seed=seed)
            for seed in self.seeds
            for keep in self.budgets
            for label in self.contenders
        )

    def recipe_of(self, cell: ComparedCell) -> Recipe:
        """The recipe with the plan, the budget and the seed of one cell."""
        assert self.recipe is not None  # `load` and the validator see to it
        contender = self.contenders[cell.method]
        budget = Budget(
            keep=cell.keep,
            of=self.of,
            over=self.over,
            by=contender.by or ("uniform" if contender.method.takes == "choice" else self.by),  # auto divides by itself
            measure=self.measure,
            tokens=self.tokens,
            levels=self.levels,
        )
        plan = [{"method": contender.method}]
        asked = {**dict(self.recipe), "plan": plan, "budget": budget, "seed": cell.seed}
        if not contender.method.is_differentiable:  # it has no use for other bases, and is compared as it is
            asked["reparameterise"] = None
        return Recipe.model_validate(asked)
