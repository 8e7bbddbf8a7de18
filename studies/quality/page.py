"""Write the tables and the plots of docs/quality.md from the rows, and nothing that is not in them.

    python studies/quality/page.py

A table stands between `<!-- rows: MODEL DEPTH STEPS -->` and `<!-- end -->`; the plot beside it is docs/quality-*.svg.
With the name of one of the recipe's `tables` behind STEPS it has the variants of that table alone, and a plot if that
is `main`. `<!-- by LABEL: MODEL LABEL=VALUE ... -->` has the in-domain perplexity (or the accuracy) after recovery of
every variant that was measured at several values of the first label, a column for each. Batch size and rate are the
model's own where nothing is said of them; `learning_rate=best` takes the rate that ends lowest, of those that were run.
`<!-- speed -->` is filled from benchmarks/results/structures.jsonl.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
MARK = re.compile(r"(<!-- rows: (\S+) (\d+) (\d+) ?(\w*) -->\n).*?(<!-- end -->)", re.DOTALL)
BY = re.compile(r"(<!-- by (\w+): (\S+) ?(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
SPEED = re.compile(r"(<!-- speed -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH, LEFT, RIGHT, ROW = 720, 230, 20, 26
COLOURS = {"in_domain": "#1f6fb4", "held_out": "#c2571a"}
OWN = ("batch_size", "learning_rate")  # what a table takes from the model, where it says nothing else
COLUMNS = {"steps": "{} steps", "depth": "last {}", "learning_rate": "{:.3g}", "batch_size": "{} windows a step"}
NAMES = {"in_domain": "in-domain", "held_out": "held-out", "exam": "exam"}
Row = dict[str, Any]


@cache
def recipe() -> dict[str, Any]:
    return yaml.safe_load((HERE / "study.yaml").read_text())


def own_settings() -> dict[str, dict[str, Any]]:
    """Batch size and rate of every model, as the recipe has them."""
    return {name: {key: about["recovery"][key] for key in OWN} for name, about in recipe()["models"].items()}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def select(rows: list[Row], model: str, **labels: Any) -> list[Row]:
    """The rows of a model with these labels, and with the model's own batch size and rate unless a label is None."""
    wanted = {"model": model} | own_settings().get(model, {}) | labels
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items() if value is not None)]


def group(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by variant, best first on in-domain text (on the exam, where there is no text)."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)

    return dict(sorted(found.items(), key=lambda item: mean([loss(row) for row in item[1]])))


def loss(row: Row) -> float:
    """What is the smaller the better: in-domain perplexity, or minus the accuracy in the exam."""
    return row["after"]["in_domain"] if "in_domain" in row["after"] else -row["after"]["exam"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def shown(values: list[float]) -> str:
    """A mean, with the standard deviation where there is more than one value."""
    middle = mean(values)
    digits = 3 if middle < 1 else 2 if middle < 100 else 0
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    return f"{middle:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def table(variants: dict[str, list[Row]]) -> str:
    first = next(iter(variants.values()))[0]
    texts = [key for key in ("in_domain", "held_out", "exam") if key in first["after"]]
    head = ["start and operator, loss", "seeds", "numbers in the blocks", "model"]
    head += [f"{NAMES[text]} before" for text in texts] + [f"**{NAMES[text]} after**" for text in texts]
    lines = [head, ["---"] * len(head)]
    for variant, rows in variants.items():
        cells = [variant, str(len(rows)), f"{rows[0]['stored']:,}", f"{rows[0]['parameters']:,}"]
        cells += [shown([row["before"][text] for row in rows]) if "before" in rows[0] else "" for text in texts]
        cells += [shown([row["after"][text] for row in rows]) for text in texts]
        lines.append(cells)
    lines.append(["dense model", "", "", ""] + [""] * len(texts) + [shown([first["dense"][text]]) for text in texts])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def plot(variants: dict[str, list[Row]], title: str) -> str:
    """Perplexity after recovery, one mark for each seed, relative to the dense model's on a logarithmic axis."""
    texts = [text for text in COLOURS if text in next(iter(variants.values()))[0]["after"]]
    factors = {
        variant: {text: [row["after"][text] / row["dense"][text] for row in rows] for text in texts}
        for variant, rows in variants.items()
    }
    top = max(value for of_text in factors.values() for values in of_text.values() for value in values) * 1.08
    height, bottom = 64 + ROW * len(variants) + 34, 60 + ROW * len(variants)

    def x(value: float) -> float:
        return LEFT + math.log(value) / math.log(top) * (WIDTH - LEFT - RIGHT)

    parts = [f'<text x="8" y="20" font-size="15" font-weight="bold">{escape(title)}</text>']
    for number, text in enumerate(texts):
        at = LEFT + 130 * number
        parts.append(f'<circle cx="{at}" cy="40" r="5" fill="{COLOURS[text]}"/>')
        parts.append(f'<text x="{at + 10}" y="44">{NAMES[text]} text</text>')
    parts += axis(top, bottom, x)
    for number, (variant, of_text) in enumerate(factors.items()):
        y = 60 + ROW * number + ROW / 2
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(variant)}</text>')
        parts += [mark(variant, text, value, x(value), y) for text, values in of_text.items() for value in values]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{WIDTH}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def axis(top: float, bottom: float, x: Callable[[float], float]) -> list[str]:
    """Lines at round factors from 1 to `top`, and what they are."""
    ticks = [t for t in (1, 1.1, 1.2, 1.3, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100) if t <= top]
    ticks = ticks if len(ticks) < 9 else [t for t in ticks if t in (1, 2, 3, 5, 10, 20, 50, 100)]
    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{x(tick):.1f},52V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    label = "perplexity after recovery, times the dense model's"
    return [*parts, f'<text x="{(LEFT + WIDTH) / 2}" y="{bottom + 33}" text-anchor="middle">{label}</text>']


def mark(variant: str, text: str, value: float, x: float, y: float) -> str:
    sentence = f"{variant}, {NAMES[text]}: {value:.3f} times the dense model's perplexity"
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{COLOURS[text]}" fill-opacity="0.75">'
    return f"{circle}<title>{escape(sentence)}</title></circle>"


def fill(page: str, rows: list[Row]) -> tuple[str, dict[str, str]]:
    """The page with its tables, and the plots by file name."""
    plots: dict[str, str] = {}

    def replaced(match: re.Match) -> str:
        begin, model, depth, steps, name, end = match.groups()
        chosen = select(rows, model, depth=int(depth), steps=int(steps))
        variants = group([row for row in chosen if not name or row["variant"] in recipe()["tables"][name]])
        if not variants:
            return f"{begin}Not run.\n{end}"
        content = table(variants)
        if name in ("", "main") and "in_domain" in next(iter(variants.values()))[0]["after"]:
            file, title = f"quality-{model}-{depth}-{steps}.svg", f"{model}, last {depth} blocks, {steps} steps"
            plots[file] = plot(variants, title)
            content = f"![{title}]({file})\n\n{content}"
        return f"{begin}{content}{end}"

    return MARK.sub(
        replaced, BY.sub(lambda match: match[1] + by_label(rows, *match.group(2, 3, 4)) + match[5], page)
    ), plots


def by_label(rows: list[Row], label: str, model: str, labels: str) -> str:
    """Perplexity or accuracy after recovery, a row for each variant and a column for each value of the label."""
    wanted: dict[str, Any] = {label: None}
    for key, value in (item.split("=") for item in labels.split()):
        wanted[key] = None if value == "best" else float(value) if key == "learning_rate" else int(value)
    found: dict[str, dict[Any, list[Row]]] = {}
    for row in select(rows, model, **wanted):
        found.setdefault(row["variant"], {}).setdefault(row[label], []).append(row)
    found = {variant: of_value for variant, of_value in found.items() if len(of_value) > 1}
    if not found:
        return "Not run.\n"
    best = "learning_rate=best" in labels.split()
    values = sorted({value for of_value in found.values() for value in of_value})
    lines = [["start and operator, loss", *(COLUMNS[label].format(value) for value in values)]]
    lines.append(["---"] * len(lines[0]))
    for variant, of_value in sorted(found.items(), key=lambda item: best_of(item[1][max(item[1])])[0]):
        lines.append([variant, *(cell(of_value.get(value, []), best) for value in values)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def best_of(rows: list[Row]) -> tuple[float, list[float], float]:
    """The mean over seeds at the rate at which it is lowest, what was averaged, and the rate."""
    rates: dict[float, list[float]] = {}
    for row in rows:
        rates.setdefault(row["learning_rate"], []).append(loss(row))
    return min((mean(values), values, rate) for rate, values in rates.items())


def cell(rows: list[Row], with_rate: bool) -> str:
    if not rows:
        return ""
    _, values, rate = best_of(rows)
    return shown([abs(value) for value in values]) + (f" (at {rate:g})" if with_rate else "")


def speed(page: str, rows: list[Row]) -> str:
    """The page with how fast one block's layers are, as times the speed of the dense ones."""
    tokens = sorted({row["tokens"] for row in rows})
    cells = {(row["structure"], row["tokens"]): row for row in rows}  # of repeated measurements the last
    names = dict.fromkeys(row["structure"] for row in rows)
    lines = [["layers of a block", "numbers", "MACs per token", *(f"{n} tokens" for n in tokens)]]
    lines.append(["---"] * len(lines[0]))
    for name in names:
        first = cells[name, tokens[0]]
        times = [f"{cells[name, n]['speedup']:.2f}" for n in tokens]
        lines.append([name, f"{first['numbers']:,}", f"{first['macs_per_token']:,}", *times])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return SPEED.sub(lambda match: match[1] + table + match[2], page)


if __name__ == "__main__":
    text, drawings = fill((DOCS / "quality.md").read_text(), read(HERE / "results.jsonl"))
    text = speed(text, read(HERE.parents[1] / "benchmarks" / "results" / "structures.jsonl"))
    (DOCS / "quality.md").write_text(text)
    for file, drawing in drawings.items():
        (DOCS / file).write_text(drawing)
    print(len(drawings), "plots")
