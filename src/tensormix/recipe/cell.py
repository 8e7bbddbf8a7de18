"""One run of a sweep: a method on some blocks, which follow each other in one of several directions."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from tensormix.plan import AnyMethod, Plan, Rule
from tensormix.settings import Settings

Direction = Literal["last", "first", "middle_out", "middle_to_late", "single"]
Place = Direction | Literal["blocks"]  # blocks: listed one by one


class Cell(Settings):
    """One run of a sweep: a method on some blocks."""

    direction: Place
    blocks: tuple[int, ...] = Field(min_length=1)  # in the order of the direction
    method: AnyMethod
    settings: dict[str, object] = Field(default={})  # what tells the method from others of the sweep
    plan: str | None = None  # the name of rules that go together, of which `method` is the first one's
    rules: tuple[Rule, ...] = ()  # of that plan; their blocks are those of the cell

    @property
    def depth(self) -> int:
        """The number of compressed blocks."""
        return len(self.blocks)

    @property
    def where(self) -> str:
        """The blocks as a rule of a plan says them."""
        if self.direction in ("last", "first"):
            return f"{self.direction} {self.depth}"
        return ",".join(map(str, sorted(self.blocks)))

    @property
    def name(self) -> str:
        """A folder's: "last-04-mixt4", "single-05-svd0.5", "blocks-3_4-zero"."""
        place = {"single": f"{self.blocks[0]:02d}", "blocks": "_".join(map(str, self.blocks))}
        return f"{self.direction}-{place.get(self.direction, f'{self.depth:02d}')}-{self.variant}"

    @property
    def label(self) -> str:
        """The method, or the plan of several."""
        return self.plan or self.method.name

    @property
    def variant(self) -> str:
        """The method with its settings, the first of them without its name: "mixt4", "svd0.5-inputsdense"."""
        if self.plan is not None:
            return _plain(self.plan)
        said = [f"{key if number else ''}{_plain(value)}" for number, (key, value) in enumerate(self.settings.items())]
        return "-".join([self.method.name + "".join(said[:1]), *said[1:]])

    def plan_at(self, sites: tuple[str, ...] | str | None) -> Plan:
        """What the cell compresses; `sites` are those of a method that is alone."""
        rules = self.rules or (
            Rule(sites=None if self.method.takes in ("block", "span") else sites, method=self.method),
        )
        return Plan(tuple(rule.model_copy(update={"blocks": self.where}) for rule in rules))

    @property
    def series(self) -> tuple[str, str]:
        """Cells of one series differ in their blocks alone."""
        return self.direction, self.variant


def schedule(direction: Direction, num_blocks: int) -> tuple[int, ...]:
    """The blocks in the order in which a direction compresses them."""
    blocks, middle = range(num_blocks), num_blocks // 2
    match direction:
        case "last":
            return tuple(reversed(blocks))
        case "middle_to_late":
            return tuple(blocks[middle:])
        case "middle_out":  # of two that are equally far from the middle the later one first
            return tuple(sorted(blocks, key=lambda block: (abs(2 * block - num_blocks + 1), -block)))
        case "first" | "single":
            return tuple(blocks)


def _plain(value: object) -> str:
    """A value as a part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")
