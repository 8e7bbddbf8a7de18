"""A sweep: many runs of one recipe that differ in which blocks are compressed, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from tensormix.methods import Method
from tensormix.plan import AnyMethod, Plan, Rule
from tensormix.reading import validated
from tensormix.recipe.cell import Cell, Direction, Place, schedule
from tensormix.recipe.recipe import Recipe, load_with_recipe
from tensormix.settings import Settings, is_list, is_mapping

Baseline = Literal["zero", "drop_blocks"]


class Depths(Settings):
    """How deep one direction of a sweep goes."""

    depths: Literal["all"] | tuple[int, ...] = "all"  # numbers of compressed blocks

    @field_validator("depths", mode="before")
    @classmethod
    def _positive(cls, value: object) -> object:
        return checked_depths(value)


class Baselines(Settings):
    """What compression has to beat: the same blocks zeroed or dropped, with the same recovery."""

    methods: tuple[Baseline, ...] = ("zero", "drop_blocks")
    depths: Literal["all"] | tuple[int, ...] | None = None  # without it those of the direction
    directions: tuple[Direction, ...] | None = None  # without it last, or the blocks that the sweep lists

    @field_validator("depths", mode="before")
    @classmethod
    def _positive(cls, value: object) -> object:
        return None if value is None else checked_depths(value)


class Sweep(Settings):
    """Many runs of one recipe that differ in which blocks are compressed, and how.

    The plan of the recipe is the template: it is empty, or has one rule, whose `blocks` are replaced in every cell and
    whose method gets every combination of the settings in `vary`. `plans` are whole plans beside it, such as one method
    for the attention and another for the MLPs.
    """

    base: str | None = None  # a recipe file, relative to the sweep's
    recipe: Recipe | None = None  # the same, written here; `load` fills it in from `base`
    # setting of the method -> values; the key `method` has whole methods in the place of the template's, and "of.keep"
    # is the setting `keep` of the method within a method
    vary: dict[str, tuple[object, ...]] = Field(default={})
    plans: dict[str, Plan] = Field(default={})  # name -> rules without blocks
    depths: Literal["all"] | tuple[int, ...] = "all"  # numbers of compressed blocks, for all directions
    # each with depths of its own; without any it is last, or only the listed blocks
    directions: dict[Direction, Depths | None] = Field(default={})
    blocks: tuple[tuple[int, ...], ...] = ()  # a cell for each list
    baselines: Baselines | None = None
    search: Literal["scan", "bisect"] = "scan"  # every depth, or only as many as finding the boundary takes
    warm_start: bool = False  # of a scan: every depth goes on from the recovered model of the depth before
    family: tuple[str, ...] = ()  # other dense models of the family, for the trend of loss against parameters

    @field_validator("depths", mode="before")
    @classmethod
    def _positive(cls, value: object) -> object:
        return checked_depths(value)

    @field_validator("directions", mode="before")
    @classmethod
    def _as_mapping(cls, value: object) -> object:
        return dict.fromkeys(value) if is_list(value) else value

    @field_validator("blocks")
    @classmethod
    def _each_block_once(cls, value: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        for blocks in value:
            if not blocks or min(blocks) < 0 or len(set(blocks)) < len(blocks):
                raise ValueError(f"each is a list of blocks from 0, each block once, got {list(blocks)}")
        return value

    @model_validator(mode="after")
    def _one_recipe(self) -> Self:
        if self.base is None and self.recipe is None:
            raise ValueError("needs base (the path of a recipe) or recipe (the recipe itself)")
        if self.recipe is not None and len(self.recipe.plan.root) > 1:
            raise ValueError("the recipe's plan is a template: it must be empty or one rule")
        for name, values in self.vary.items():
            if not values:
                raise ValueError(f"vary: {name} needs at least one value")
        for name, plan in self.plans.items():
            for rule in plan.root:
                if rule.blocks != "all":
                    raise ValueError(
                        f"plans: {name} names blocks {rule.blocks!r}; leave them out, the sweep gives them"
                    )
        if self.recipe is not None:
            for method in [*(m for m, _ in self.variants()), *(r.method for p in self.plans.values() for r in p.root)]:
                self._check_method(method)
        return self

    def _check_method(self, method: Method) -> None:
        if method.takes == "model":
            raise ValueError(f"{method.name} changes the whole model, so there is nothing to sweep over its blocks")
        if getattr(method, "num_chosen", None) is not None:
            raise ValueError(f"{method.name} chooses its blocks itself, and a sweep names them")
        if method.needs and self.recipe is not None and self.recipe.calibration is None:
            raise ValueError(f"the method {method.name} needs calibration, and the recipe has no such section")

    @model_validator(mode="after")
    def _single_has_no_depth(self) -> Self:
        if self.directions.get("single") is not None:
            raise ValueError("directions: single takes every block alone: leave out its depths, or list blocks")
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
        if recover.parameters == "lora" and recover.lora.layers == "all":
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
        if self.blocks or "single" in self.directions:
            raise ValueError("search: bisect follows a direction of depths: leave out blocks and single, or give scan")
        if self.warm_start:
            raise ValueError("search: bisect jumps between depths, so none can go on from the one before (warm_start)")
        if self.recipe is not None and self.recipe.evaluate.exam is None:
            raise ValueError("search: bisect compares accuracies, so it needs evaluate.exam")
        return self

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> Self:
        """The sweep in a YAML file, its recipe included; `model` replaces that of the recipe.

        Raises ValueError as `Recipe.load` does.
        """
        return load_with_recipe(cls, Path(path), "sweep", model)

    def variants(self) -> list[tuple[Method, dict[str, object]]]:
        """Every method of the sweep but the baselines, with the settings that tell it from the others.

        Raises ValueError for a setting or a value that a method does not have, and for two that are the same.
        """
        assert self.recipe is not None  # `load` and the validators see to it
        rules = self.recipe.plan.root
        template: dict[str, object] = rules[0].method.model_dump() if rules else {"name": "mixt"}
        settings = {name: values for name, values in self.vary.items() if name != "method"}
        if self.plans and not rules and not self.vary:
            return []
        wholes = self.vary.get("method", () if rules or self.vary else ({"name": "mixt", "num_branches": 4},))
        found: dict[str, tuple[Method, dict[str, object]]] = {}
        for whole in wholes or (None,):
            start = template if whole is None else whole if is_mapping(whole) else {"name": whole}
            own = {} if whole is None else {key: value for key, value in start.items() if key != "name"}
            for values in product(*settings.values()):
                changes = {**own, **dict(zip(settings, values, strict=True))}
                method = validated(_Varied, {"method": _changed(start, changes)}, "vary").method
                name = Cell(direction="single", blocks=(0,), method=method, settings=changes).variant
                if name in found:
                    raise ValueError(f"vary: {name} is there twice; its runs could not be told apart")
                found[name] = (method, changes)
        return list(found.values())

    def cells(self, num_blocks: int) -> tuple[Cell, ...]:
        """Every run of the sweep on a model with `num_blocks` blocks, in order.

        Raises ValueError if a depth or a block is more than the model has.
        """
        cells: dict[str, Cell] = {}  # in order, without repeats

        def add(places: Iterator[tuple[Place, tuple[int, ...]]], contenders: list[_Template]) -> None:
            for direction, chosen in places:
                for contender in contenders:
                    cell = Cell(direction=direction, blocks=chosen, **contender._asdict())
                    cells.setdefault(cell.name, cell)

        directions = tuple(self.directions) or (() if self.blocks else ("last",))
        contenders = [_Template(method, settings=own) for method, own in self.variants()]
        contenders += [_Template(p.root[0].method, plan=n, rules=p.root) for n, p in self.plans.items()]
        add(self._places(directions, None, num_blocks), contenders)
        if self.baselines is not None:
            nulls = [
                _Template(validated(_Varied, {"method": {"name": n}}, "sweep").method) for n in self.baselines.methods
            ]
            chosen = self.baselines.directions or (("last",) if "last" in directions or not self.blocks else ())
            add(self._places(chosen, self.baselines.depths, num_blocks), nulls)
        return tuple(cells.values())

    def _places(
        self, directions: tuple[Direction, ...], depths: Literal["all"] | tuple[int, ...] | None, num_blocks: int
    ) -> Iterator[tuple[Place, tuple[int, ...]]]:
        """The blocks of every cell of some directions, then those that are listed."""
        for direction in directions:
            order, own = schedule(direction, num_blocks), self.directions.get(direction)
            if direction == "single":
                for block in order:
                    yield direction, (block,)
                continue
            for depth in _resolved(depths or (own.depths if own else self.depths), direction, len(order), num_blocks):
                yield direction, order[:depth]
        for blocks in self.blocks:
            if max(blocks) >= num_blocks:
                raise ValueError(f"sweep: blocks lists {max(blocks)}; the model has {num_blocks} blocks, from 0")
            yield "blocks", blocks


class _Template(NamedTuple):
    """A cell without its blocks."""

    method: Method
    settings: Mapping[str, object] = MappingProxyType({})
    plan: str | None = None
    rules: tuple[Rule, ...] = ()


class _Varied(Settings):
    """For the validation of a method alone."""

    method: AnyMethod


def checked_depths(value: object) -> object:
    """`value` if it is "all" or a list of positive integers, without repeats. Raises ValueError otherwise."""
    if value == "all":
        return value
    depths = value if is_list(value) else [value]
    if not depths or any(not isinstance(depth, int) or isinstance(depth, bool) or depth < 1 for depth in depths):
        raise ValueError(f"depths must be 'all' or a list of numbers of blocks from 1, got {value!r}")
    return tuple(dict.fromkeys(depths))


def _resolved(depths: Literal["all"] | tuple[int, ...], direction: str, largest: int, num_blocks: int) -> Iterable[int]:
    if depths == "all":
        return range(1, largest + 1)
    if max(depths) > largest:
        there = f"the model has {num_blocks}" + ("" if largest == num_blocks else f", {direction} reaches {largest}")
        raise ValueError(f"sweep: depths asks for {max(depths)} blocks; {there}")
    return depths


def _changed(data: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    """The same settings with some changed; "of.keep" is `keep` of the mapping `of`."""
    data = dict(data)
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        inner = data.get(first)
        data[first] = _changed(inner if is_mapping(inner) else {}, {rest: value}) if rest else value
    return data
