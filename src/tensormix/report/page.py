"""The page itself: sections in order, and the parts that all pages share."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from tensormix.rows import STAGES

from .figure import Figure, Table
from .measures import CHANCE, Record
from .numbers import moment, number, plural, seconds_text
from .published import numbers_of
from .read import Contest, Run, Sweep, runs_of
from .rendering import asset, render, say


class Section(NamedTuple):
    key: str
    name: str
    parts: list[Markup]


@dataclass
class Page:
    """Sections of a page in order; figures are numbered as they are added."""

    title: str
    eyebrow: Markup
    headline: Markup
    lead: Sequence[Markup] = ()  # below the headline
    sections: list[Section] = field(default_factory=list)
    num_figures: int = 0

    def section(self, key: str, name: str, *parts: Markup | Figure | Table | None) -> None:
        """Add a section; parts that are None or empty are left out, and so is a section without parts."""
        inner = []
        for part in parts:
            if isinstance(part, Figure):
                self.num_figures += 1
                inner.append(part.html(self.num_figures, numbers_of(part.key)))
            elif part:
                inner.append(escape(part))
        if inner:
            self.sections.append(Section(key, name, inner))

    def about(self, source: Run | Sweep | Contest, settings: Any, verb: str, name: str) -> None:
        """The last sections: what was asked, where it ran, how to do it again."""
        self.section("settings", "Settings", facts_part(source, settings), settings_part(settings, name))
        self.section("environment", "Environment", environments_part(source))
        self.section("reproduce", "How to reproduce", say("parts", "reproduce", verb, name))

    def html(self) -> str:
        return render("page", page=self, style=asset("page.css"), script=asset("page.js"))


def write(path: Path, content: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp gives the owner alone access
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as (path, text) lines."""
    if isinstance(value, dict):
        return [line for key in value for line in flat(value[key], f"{path}.{key}" if path else str(key))]
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(path or "value", "none" if value is None else words)]


def settings_part(settings: Any, name: str) -> Markup:
    """The settings as JSON, which every YAML reader takes."""
    return say("parts", "settings", json.dumps(settings, indent=2, ensure_ascii=False), name)


def environments_part(source: Run | Sweep | Contest) -> Markup:
    """Every different environment among the stages, with the runs in which it was seen."""
    found: dict[str, dict[str, None]] = {}
    if isinstance(source, Sweep) and source.environment:
        found[json.dumps(source.environment, sort_keys=True)] = {"sweep": None}
    for run in runs_of(source):
        for stage in run.stages.values():
            if stage.environment:
                found.setdefault(json.dumps(stage.environment, sort_keys=True), {})[run.name] = None
    return say("parts", "environments", [(list(names), flat(json.loads(text))) for text, names in found.items()])


def seeds(settings: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every key `seed` of nested settings with its path."""
    if isinstance(settings, dict):
        pairs = [(f"{path}.{key}".lstrip("."), key, value) for key, value in settings.items()]
    else:
        pairs = [(f"{path}[{i}]", "", value) for i, value in enumerate(settings if isinstance(settings, list) else ())]
    found: list[tuple[str, Any]] = []
    for here, key, value in pairs:
        found += [(here, value)] if key in ("seed", "seeds") or key.endswith("_seed") else seeds(value, here)
    return found


def facts_part(source: Run | Sweep | Contest, settings: Any) -> Markup | None:
    """Seeds, dates and time spent."""
    runs = list(runs_of(source))
    ends = sorted(filter(None, (moment(stage.finished) for run in runs for stage in run.stages.values())))
    lines = [(f"seed: {path}", json.dumps(value)) for path, value in seeds(settings)]
    if ends:
        lines.append(("measured", ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"))
    for name in STAGES:
        times = [number(run.stages[name].seconds) for run in runs if name in run.stages]
        known = [seconds for seconds in times if seconds is not None]
        if known:
            lines.append((f"time in {name}", f"{seconds_text(sum(known))} over {plural(len(known), 'run')}"))
    return say("parts", "definitions", lines) if lines else None


def common_notes(records: Sequence[Record]) -> Markup:
    """What a reader has to know to read the numbers rightly, as items of a list."""
    questions = sorted({item.num_questions for item in records if item.num_questions is not None})
    error = 98 / max(questions) ** 0.5 if questions else 0.0  # of a share of one half, in points
    return say("notes", "common", questions, error, CHANCE)
