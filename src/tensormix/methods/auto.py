"""A choice among methods and their sizes: each part of a model gets the one by which the model loses least."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from tensormix.methods.base import Method

if TYPE_CHECKING:
    # The union of all methods but this one. `tensormix.methods` resolves the name when its table is complete.
    AnyCandidate = Method


class Auto(Method):
    """Methods compete for every region of a model under one budget.

    A region is what one module of a block holds: the layers of its attention, those of its MLP, its experts. Each takes
    one size of one method, or stays dense; a method of whole blocks competes for all regions of a block at once. Which
    one is decided by `tensormix.allocation` before anything is compressed, and so a budget must be there.
    """

    takes = "choice"
    source = "ours; one choice from each list as in Shoham and Gersho 1988"
    summary = "Each attention, MLP and block gets the method and size of a list by which the model loses least."

    name: Literal["auto"] = "auto"
    among: tuple[AnyCandidate, ...] = Field(min_length=1, strict=False)  # one without its size is tried at several
    # Fractions of the dense cost of a region that are tried beside that of the budget; without them four around it.
    keeps: tuple[float, ...] | None = Field(default=None, strict=False)
    tokens: int = Field(default=512, ge=2)  # on which each candidate is measured alone
    part: float = Field(default=0.25, gt=0, lt=1)  # of the calibration windows; they measure, and no fit sees them

    @field_validator("among", mode="before")
    @classmethod
    def _sizes_left_open(cls, value: Any) -> Any:
        from tensormix.methods import with_sizes  # which reads the table that this class stands in

        return [with_sizes(method) for method in value] if isinstance(value, list | tuple) else value

    @field_validator("among")
    @classmethod
    def _comparable(cls, among: tuple[Method, ...]) -> tuple[Method, ...]:
        for method in among:
            if method.takes in ("span", "model") or method.num_blocks != 1:
                raise ValueError(
                    f"{method.name} changes several blocks together, so that what it loses cannot be measured beside "
                    "what others lose in one block; auto takes methods of a matrix, of layers of one block, of a block"
                )
            if method.num_chosen is not None:
                raise ValueError(f"auto chooses the blocks of {method.name} by itself: leave out choose and count")
            if among.count(method) > 1:
                raise ValueError(f"{method.name} stands there twice with the same settings; leave one of them out")
        return among

    @field_validator("keeps")
    @classmethod
    def _fractions(cls, keeps: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if keeps is not None and (not all(0 < keep < 1 for keep in keeps) or len(set(keeps)) < len(keeps)):
            raise ValueError(f"fractions of the dense cost of a region, between 0 and 1, each once, got {list(keeps)}")
        return keeps

    def sizes(self, keep: float) -> list[float]:
        """The fractions that are tried where a method allows many sizes; `keep` is the budget's."""
        around = (keep / 2, 0.75 * keep, keep + (1 - keep) / 3, keep + 2 * (1 - keep) / 3)
        return sorted({*((round(x, 4) for x in around) if self.keeps is None else self.keeps), keep} - {1.0})

    @property
    def labels(self) -> dict[str, Method]:
        """The methods by name; where several have one name, by that and by what they set."""
        names = Counter(method.name for method in self.among)
        return {_label(method, names[method.name] > 1): method for method in self.among}

    def check_budget(self, by: str, measure: str) -> None:
        """Raise ValueError if a budget asks for another way to divide it, or for a measure of blocks alone."""
        if by != "uniform":
            raise ValueError(f"auto measures every candidate and divides the budget by that: leave out by, got {by!r}")
        if measure == "angle":
            raise ValueError("measure 'angle' looks at blocks and not at what becomes of them; auto takes kl or loss")


def _label(method: Method, full: bool) -> str:
    settings = method.model_dump(mode="json", exclude_defaults=True, exclude={"name"}) if full else {}
    if method.size in settings and settings[method.size] == method.largest:
        del settings[method.size]
    return " ".join([method.name, *(f"{key}={value}" for key, value in settings.items())])
