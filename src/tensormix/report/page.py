"""The page itself: head, sections in order, style sheet and script, everything in one file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .figure import Figure, download, render
from .measures import CHANCE, Record
from .numbers import moment, number, percent, seconds_text, text
from .published import numbers_of
from .read import STAGES, Contest, Run, Sweep, runs_of

# nothing may be fetched: the page is complete, and a browser is told to refuse anything else
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass
class Page:
    """Sections of a page in order; figures are numbered as they are added."""

    title: str
    eyebrow: str
    headline: str  # HTML
    lead: str = ""  # HTML below the headline
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    num_figures: int = 0

    def section(self, key: str, name: str, *parts: str | Figure | None) -> None:
        """Add a section; parts that are None or empty are left out, and so is a section without parts."""
        inner = ""
        for part in parts:
            if isinstance(part, Figure):
                self.num_figures += 1
                inner += render(part, self.num_figures, numbers_of(part.key))
            elif part:
                inner += part
        if inner:
            self.sections.append((key, name, inner))

    def html(self) -> str:
        links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in self.sections)
        body = "".join(
            f'<section id="{key}" aria-labelledby="{key}-name"><h2 id="{key}-name">{name}</h2>{inner}</section>'
            for key, name, inner in self.sections
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>{text(self.title)}</title>\n<style>{asset('page.css')}</style>\n</head>\n<body>\n"
            f'<a class="skip" href="#{self.sections[0][0]}">Skip to the results</a>\n'
            f'<header><p class="eyebrow">{self.eyebrow}</p><h1>{self.headline}</h1>{self.lead}'
            f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n<main>\n{body}\n</main>\n'
            "<footer><p>Written by tensormix from the JSON files of the folder; the page holds everything and loads "
            "nothing.</p>"
            '</footer>\n<div id="tip" role="status" aria-live="polite" '
            f"hidden></div>\n<script>{asset('page.js')}</script>\n"
            "</body>\n</html>\n"
        )


def asset(name: str) -> str:
    return resources.files(__package__ or "tensormix.report").joinpath(name).read_text(encoding="utf-8")


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


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (name, value, remark), all HTML."""
    inner = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in items)
    return f'<dl class="tiles">{inner}</dl>'


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as (path, text) lines."""
    if isinstance(value, dict):
        return [line for key in value for line in flat(value[key], f"{path}.{key}" if path else str(key))]
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(path or "value", "none" if value is None else said)]


def definitions(lines: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in lines) + "</dl>"


def settings_part(settings: Any, name: str) -> str:
    """The settings as JSON, which every YAML reader takes."""
    content = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=False)
    link = download(name, content + "\n", text(name), "application/json")
    return (
        f'<p class="small">Download as {link}. It is JSON, which is also valid YAML.</p>'
        f'<pre tabindex="0"><code>{text(content)}</code></pre>'
    )


def environments_part(source: Run | Sweep | Contest) -> str:
    """Every different environment among the stages, with the runs in which it was seen."""
    found: dict[str, list[str]] = {}
    if isinstance(source, Sweep) and source.environment:
        found[json.dumps(source.environment, sort_keys=True)] = ["sweep"]
    for run in runs_of(source):
        for stage in run.stages.values():
            if stage.environment:
                names = found.setdefault(json.dumps(stage.environment, sort_keys=True), [])
                names += [run.name] if run.name not in names else []
    if not found:
        return '<p class="none">No environment was recorded.</p>'
    parts = []
    for index, (content, names) in enumerate(found.items()):
        heading = "" if len(found) == 1 else f"<h3>Environment {index + 1}</h3><p>{text(_some(names))}</p>"
        parts.append(heading + definitions(flat(json.loads(content))))
    note = f"<p>The runs were made in {len(found)} different environments.</p>" if len(found) > 1 else ""
    return note + "".join(parts)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def seeds(settings: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every key `seed` of nested settings with its path."""
    found: list[tuple[str, Any]] = []
    pairs = (
        settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    )
    for key, value in pairs:
        here = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        if key == "seed" or (isinstance(key, str) and key.endswith("_seed")) or key == "seeds":
            found.append((here, value))
        else:
            found.extend(seeds(value, here))
    return found


def facts_part(source: Run | Sweep | Contest, settings: Any) -> str:
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
            lines.append(
                (f"time in {name}", f"{seconds_text(sum(known))} over {len(known)} run{'s' * (len(known) != 1)}")
            )
    return definitions(lines) if lines else ""


def reproduce_part(verb: str, name: str) -> str:
    command = f"tensormix {verb} {name}"
    return (
        "<p>Save the settings above next to the files that they name (relative paths are relative to the settings "
        "file), then run:</p>"
        f'<pre tabindex="0"><code>{text(command)}</code></pre>'
        "<p>The same settings, versions and hardware give the same numbers up to the order of floating-point sums; "
        "times differ from run to run.</p>"
    )


def common_notes(records: Sequence[Record]) -> list[str]:
    """What a reader has to know to read the numbers rightly, as HTML."""
    questions = sorted({item.num_questions for item in records if item.num_questions is not None})
    said = " or ".join(str(num) for num in questions)
    notes = [f"Every question has four answers, so guessing gives {percent(CHANCE, 0)} (the chance level) on average."]
    if questions:
        half = 0.98 / max(questions) ** 0.5
        notes.append(
            f"The exam has {said} questions. The sampling error alone is then up to ±{100 * half:.1f} points, so "
            "differences of that size between two checkpoints are not to be read as better or worse."
        )
    else:
        notes.append("The number of exam questions was not recorded or no exam was taken.")
    notes += [
        "A 95&nbsp;% interval of accuracy says how far the result may lie from the accuracy on endlessly many "
        "questions of the same kind. It does not hold what another training seed would change: each checkpoint was "
        "trained once.",
        "Perplexities are comparable only for the same tokenizer, window and stride; here they are the same for all "
        "checkpoints unless the settings say otherwise.",
        "Latency is the median of the repeats, dense and compressed measured in turn in the same process; a ratio "
        "above 1 is faster than dense. MACs are counted, latency is measured: fewer MACs need not be faster.",
    ]
    return [*notes, PAPERS]


PAPERS = (
    "Figures name those of the papers that show the same: [M] is arXiv 2605.25344, [R] is arXiv 2606.03465. What they "
    "show here was measured in these runs."
)


def listed(notes: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{note}</li>' for note in notes)}</ul>"
