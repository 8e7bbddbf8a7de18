"""The page of all classes, from the rows."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from configs import every_class
from features import FEATURES

MARKS = {"right": "yes", "refused": "-", "red": "**no**", "not tried": ""}
INTRODUCTION = """\
## Every class of transformers that writes text

Written by `make families`, which makes a tiny random model of every class and tries every feature on it; the rows are
in `families.jsonl`. *yes*: right, proved by a number in its row. *-*: refused by a sentence, and the model is as it
was. **no**: wrong. Empty: the dense model does not do it either. *?*: there is no row yet. The joint methods may be
off by half of the logits' length at 97 % of their size, which tells broken models from whole ones and no more. LoRA of
peft is not tried: it is not installed."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The last row of each class and feature."""
    if not file.exists():
        return []
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return list({(row["class"], row["feature"]): row for row in rows}.values())


def section(rows: list[dict[str, Any]]) -> str:
    """The table of the classes, what is wrong, the sentences of refusals, and what cannot be tried."""
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        table[row["class"]][row["feature"]] = row["answer"]
    lines = [f"| class | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
    for name, found in sorted(table.items()):
        if "dense" not in found:
            marks = (MARKS[found[feature]] if feature in found else "?" for feature in FEATURES)
            lines.append(f"| {name.split()[1]} ({name.split()[0]}) | {' | '.join(marks)} |")
    said = ((title, _sentences(rows, answer)) for title, answer in (("Wrong", "red"), ("Refused", "refused")))
    parts = [f"### {title}\n\n{sentences}" for title, sentences in said if sentences]
    dense = [f"* {row['class']}: {_cell(row['says'])}" for row in rows if row["feature"] == "dense"]
    parts += ["### No tiny model\n\n" + "\n".join(sorted(dense))] if dense else []
    missing = sum(feature not in found for found in table.values() if "dense" not in found for feature in FEATURES)
    absent = [tiny.name for tiny in every_class() if tiny.name not in table]
    counts = f"{len(rows)} rows. Without a row: {missing} cells of the table, and {len(absent)} classes"
    parts += [f"### Not run yet\n\n{counts}{': ' if absent else ''}{', '.join(sorted(absent))}."]
    return "\n\n".join([INTRODUCTION, "\n".join(lines), *parts]) + "\n"


def _sentences(rows: list[dict[str, Any]], answer: str) -> str:
    """What was said, once for each feature and kind of sentence, with the number of classes."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["answer"] == answer:
            kind = re.sub(r"[\w.]*\d[\w.]*|\b\w+[A-Z]\w+\b|'[^']*'", "", row["says"])
            kinds[row["feature"], kind[:60]].append(row["says"])
    lines = [f"* *{feature}*, {len(said)}: {_cell(said[0])}" for (feature, _), said in kinds.items()]
    return "\n".join(sorted(lines))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("<", "&lt;").split())
