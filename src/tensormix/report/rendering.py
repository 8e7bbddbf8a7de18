"""HTML from the templates: every value is escaped there, and a name that a template misses is an error."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import numbers

FILTERS = ("bytes_text", "change", "count", "fixed", "nb", "percent", "plural", "short", "short_name", "speed")


def environment() -> Environment:
    found = Environment(
        loader=PackageLoader("tensormix.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters.update({name: getattr(numbers, name) for name in FILTERS})
    return found


ENVIRONMENT = environment()


def render(name: str, /, **facts: Any) -> Markup:
    """A whole template."""
    return Markup(ENVIRONMENT.get_template(f"{name}.html").render(facts))


def say(name: str, macro: str, /, *args: Any, **facts: Any) -> Markup:
    """One macro of a template."""
    return getattr(ENVIRONMENT.get_template(f"{name}.html").module, macro)(*args, **facts)


def asset(name: str) -> Markup:
    """A file of the package, as it stands."""
    return Markup(resources.files(__package__ or "tensormix.report").joinpath(name).read_text(encoding="utf-8"))
