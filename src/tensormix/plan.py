"""Which site gets which method: plain data, no tensors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, RootModel, WrapValidator, field_validator
from pydantic import ValidatorFunctionWrapHandler as Handler

from tensormix.methods import METHODS
from tensormix.methods.base import Method
from tensormix.reading import read_any_yaml, validated
from tensormix.sites import FUSED, ROLES, Site

_COUNTED = re.compile(r"(last|first) +(\d+)")
_RANGE = re.compile(r"(\d+)(?: *- *(\d+))?")
_KINDS = {
    "matrix": ("linear", "experts"), "stack": ("experts",), "layers": ("linear",),
    "block": ("block",), "span": ("block",), "model": ("block",), "choice": ("linear", "experts"),
}  # what a method takes -> the sites that it works on  # fmt: skip


def _method(value: Any, validate: Handler) -> Method:
    # A method made in Python need not stand in the table.
    return value if isinstance(value, Method) else validate(value)


if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[
        Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")],
        WrapValidator(_method),
        PlainSerializer(lambda method: method.model_dump(mode="json")),
    ]


class Rule(BaseModel):
    """One line of a plan: these sites in these blocks get this method.

    Args:
        blocks: "last 17", "first 5", "3-7", "2", "1,4,6", "all", or an integer or a list of integers, from 0.
        sites: a list of roles (q, k, v, o, gate, up, down, or the fused qkv, gate_up), or one regular expression
            for the whole name of a site; without it every linear layer and every stack of experts of the blocks (of
            a method that changes layers together, those whose role it knows; v and o, up and down only where a module
            has both). Not for a method that works on whole blocks.
        method: a mapping with the `name` of a method and its settings, or a method.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: AnyMethod
    blocks: str = "all"
    sites: tuple[str, ...] | str | None = None

    @field_validator("blocks", mode="before")
    @classmethod
    def _known_blocks(cls, value: Any) -> str:
        indices = value if isinstance(value, list | tuple) else [value]
        if indices and all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in indices):
            return ",".join(str(index) for index in indices)
        if not isinstance(value, str):
            raise ValueError(_bad_blocks(value))
        text = value.strip()
        _parse_blocks(text)
        return text

    @field_validator("sites", mode="before")
    @classmethod
    def _known_sites(cls, value: Any) -> tuple[str, ...] | str | None:
        if value is None:
            return None
        if isinstance(value, str):
            return _checked_pattern(value)
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"sites must be a list of roles or one regular expression, got {value!r}")
        for role in value:
            if role not in ROLES:
                raise ValueError(f"unknown role {role!r}{_nearest(role, ROLES)} Known roles: {', '.join(ROLES)}.")
        return tuple(value)

    @field_validator("sites", mode="after")
    @classmethod
    def _no_sites_for_blocks(cls, value: Any, info: Any) -> Any:
        method = info.data.get("method")
        if value is not None and method is not None and "block" in _KINDS[method.takes]:
            raise ValueError(f"{method.name} works on whole blocks: leave out sites, got {value!r}")
        return value

    def __str__(self) -> str:
        if self.sites is None:
            return f"blocks {self.blocks!r}"
        sites = self.sites if isinstance(self.sites, str) else ", ".join(self.sites)
        return f"blocks {self.blocks!r}, sites {sites!r}"

    def block_indices(self, num_blocks: int) -> frozenset[int]:
        """The blocks of a model with `num_blocks` blocks that this rule is about.

        Raises ValueError if it asks for more than there are.
        """
        word, numbers = _parse_blocks(self.blocks)
        if word == "all":
            return frozenset(range(num_blocks))
        if word in ("first", "last"):
            count = numbers[0]
            if count > num_blocks:
                raise ValueError(f"blocks {self.blocks!r} asks for {count} blocks; the model has {num_blocks}")
            return frozenset(range(count) if word == "first" else range(num_blocks - count, num_blocks))
        if max(numbers) >= num_blocks:
            raise ValueError(
                f"blocks {self.blocks!r} asks for block {max(numbers)}; "
                f"the model has {num_blocks} blocks, numbered 0 to {num_blocks - 1}"
            )
        return frozenset(numbers)

    def matches(self, site: Site) -> bool:
        """Whether the rule is about this site, its block aside.

        Raises ValueError if it asks for a part of a site that the architecture fuses.
        """
        if site.kind not in _KINDS[self.method.takes]:
            return False
        if self.sites is None and self.method.roles:
            return not {site.role, *FUSED.get(site.role or "", ())}.isdisjoint(self.method.roles)
        if self.sites is None:
            return True
        if isinstance(self.sites, str):
            return re.fullmatch(self.sites, site.name) is not None
        if site.role in self.sites:
            return True
        parts = FUSED.get(site.role or "", ())
        asked = [part for part in parts if part in self.sites]
        if asked and len(asked) < len(parts):
            raise ValueError(
                f"{site.name} fuses {', '.join(parts)} into one matrix: ask for all of them or for {site.role!r}, "
                f"not for {', '.join(asked)} alone"
            )
        return bool(asked)


class Plan(RootModel[tuple[Rule, ...]]):
    """Rules in order: at each site the first one that matches wins. An empty plan leaves the model dense.

    A rule that drops blocks leaves alone those in which an earlier rule has claimed a site, and claims all sites of
    the blocks that it drops.
    """

    model_config = ConfigDict(frozen=True)
    root: tuple[Rule, ...] = ()

    @field_validator("root", mode="after")
    @classmethod
    def _alone(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        for rule in rules:
            if rule.method.takes == "model" and (len(rules) > 1 or rule.blocks != "all"):
                raise ValueError(
                    f"{rule.method.name} changes the whole model: it must be the only rule of its plan, with blocks "
                    "'all'; compress the result once more for the rest"
                )
            if rule.method.takes == "choice" and len(rules) > 1:
                raise ValueError("auto must be the only rule of its plan: put other methods among its own")
        return rules

    @classmethod
    def of(cls, value: Any) -> Plan:
        """A plan from plain data: rules in a list, one rule, one method, or the path of a YAML file with any of them.

        Of a recipe, as data or as a file, the plan is taken. Raises ValueError in one sentence if it is none.
        """
        if isinstance(value, Plan):
            return value
        if isinstance(value, str | Path):
            value = read_any_yaml(Path(value))
        if isinstance(value, dict) and "plan" in value:
            if value.get("budget") is not None or value.get("search") is not None:
                raise ValueError("plan: a budget or a search decides this plan; run its recipe, or write the sizes out")
            value = value["plan"]
        rules = value if isinstance(value, list | tuple) else [value]
        named = [{"method": rule} if _is_method(rule) else rule for rule in rules]
        return validated(cls, named, "plan")

    @property
    def whole(self) -> Any:
        """The method that changes the whole model, if the plan is such a one."""
        return next((rule.method for rule in self.root if rule.method.takes == "model"), None)

    @property
    def choice(self) -> Rule | None:
        """The only rule, if its method is still to be chosen among several."""
        return next((rule for rule in self.root if rule.method.takes == "choice"), None)

    def resolve(self, sites: Sequence[Site], num_blocks: int) -> dict[str, Method]:
        """The method of each site that gets one, in the order of `sites`.

        Raises:
            ValueError: a rule matches no site, asks for blocks that the model lacks, or for a part of a fused site,
                or its blocks or its method are still to be chosen by measuring.
        """
        chosen: dict[str, Method] = {}
        dropped: set[int | None] = set()
        touched: set[int | None] = set()
        for number, rule in enumerate(self.root):
            if rule.method.num_chosen is not None:
                raise ValueError(f"plan[{number}] ({rule}): its blocks are chosen by measuring, which was not done")
            if rule.method.takes == "choice":
                raise ValueError(f"plan[{number}] ({rule}): auto is decided by a recipe with a budget; run one")
            try:
                matched = self._matched(rule, sites, num_blocks)
            except ValueError as error:
                raise ValueError(f"plan[{number}]: {error}.") from None
            if not matched:
                raise ValueError(f"plan[{number}] ({rule}) matches no site that is still dense{_examples(sites, rule)}")
            for site in matched:
                taken = site.block in touched if site.kind == "block" else site.block in dropped
                if site.name not in chosen and not taken:
                    chosen[site.name] = rule.method
                    (dropped if site.kind == "block" else touched).add(site.block)
        return {site.name: chosen[site.name] for site in sites if site.name in chosen}

    @staticmethod
    def _matched(rule: Rule, sites: Sequence[Site], num_blocks: int) -> list[Site]:
        indices = rule.block_indices(num_blocks)
        matched = [site for site in sites if site.block in indices and rule.matches(site)]
        if rule.sites is None and rule.method.takes == "layers":
            matched = [site for site in matched if _has_partner(site, sites)]
        return matched


_PARTNERS = {"v": "o", "o": "v", "qkv": "o", "up": "down", "gate": "down", "gate_up": "down", "down": "up"}


def _has_partner(site: Site, sites: Sequence[Site]) -> bool:
    """Whether the module that holds a layer has what it is changed with: the o of a Mamba has no values."""
    wanted, holder = _PARTNERS.get(site.role or ""), site.name.rpartition(".")[0]
    beside = [other.role or "" for other in sites if other.name.rpartition(".")[0] == holder]
    return wanted is None or any(wanted in (role, *FUSED.get(role, ())) for role in beside)


def _is_method(value: Any) -> bool:
    return isinstance(value, Method) or (isinstance(value, dict) and "name" in value and "method" not in value)


def _parse_blocks(text: str) -> tuple[str, list[int]]:
    """("all", []), ("first" or "last", [count]) or ("these", indices).

    Raises ValueError if `text` is none of them.
    """
    if text == "all":
        return "all", []
    if counted := _COUNTED.fullmatch(text):
        if int(counted[2]) < 1:
            raise ValueError(f"blocks {text!r}: the count must be at least 1")
        return counted[1], [int(counted[2])]
    indices: list[int] = []
    for part in text.split(","):
        bounds = _RANGE.fullmatch(part.strip())
        if bounds is None:
            raise ValueError(_bad_blocks(text))
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if last < first:
            raise ValueError(f"blocks {text!r}: the range {part.strip()!r} runs backwards; write '{last}-{first}'")
        indices += range(first, last + 1)
    return "these", indices


def _bad_blocks(value: Any) -> str:
    word = value.split()[0] if isinstance(value, str) and value.split() else ""
    hint = _nearest(word, ("last", "first", "all")) if word else "."
    known = "'last 17', 'first 5', '3-7', '2', '1,4,6', 'all', or integers from 0"
    return f"blocks {value!r} cannot be read{hint} Write {known}."


def _checked_pattern(pattern: str) -> str:
    if pattern in ROLES:
        raise ValueError(f"sites {pattern!r} would be read as a regular expression; for the role write [{pattern}]")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"sites {pattern!r} is not a regular expression: {error}") from None
    return pattern


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f", did you mean {near[0]!r}?" if near else "."


def _examples(sites: Sequence[Site], rule: Rule) -> str:
    same_kind = [site for site in sites if site.kind in _KINDS[rule.method.takes]]
    if not same_kind:
        return f"; the model has no {_KINDS[rule.method.takes][0]} site left."
    shown = [site.name if site.role is None else f"{site.name} (role {site.role})" for site in same_kind[:3]]
    return f"; sites look like {', '.join(shown)}."
