"""One row per finished cell of a comparison, with environment, and the table of docs/comparison.md from all rows.

Rows are added to those that are there; a cell that is there is left as it was measured.

python benchmarks/comparison_rows.py runs/stories260k_comparison benchmarks/results/stories260k_comparison.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from tensormix.sweep.compare import comparison_rows

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """Means over seeds; of several seeds also the least and the largest. Rows from before a recovery are left out."""
    dense, *cells = [row for row in rows if not row["cell"].endswith("-before-recovery")]
    measures = [key for key in cells[0] if key.startswith(("perplexity", "kl"))]
    lines = [
        f"| method | {' | '.join(measures)} | stored bits | misses the budget by | seeds |",
        "|---|" + "---|" * (len(measures) + 3),
        f"| dense | {' | '.join(number(dense.get(m)) for m in measures)} | 1 | | |",
    ]
    for keep in sorted({row["keep"] for row in cells}, reverse=True):
        lines.append(f"| **keep {keep:g}** |" + " |" * (len(measures) + 3))
        labels = dict.fromkeys(row["label"] for row in cells)
        groups = [[row for row in cells if (row["label"], row["keep"]) == (label, keep)] for label in labels]
        for group in sorted((g for g in groups if g), key=lambda g: mean(row[measures[0]] for row in g)):
            first = group[0]
            name = f"*{first['label']}*" if first["null"] else first["label"]
            spread = " | ".join(over_seeds([row[m] for row in group]) for m in measures)
            stored = f"{first['bits'] / dense['bits']:.3f} | {first['missed_by']:+.4f} | {len(group)}"
            lines.append(f"| {name} | {spread} | {stored} |")
    return "\n".join(lines)


def over_seeds(values: list[float]) -> str:
    span = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(mean(values)) + span


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def main(folder: Path, out: Path) -> None:
    there = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    made = [row for row in comparison_rows(folder) if row["bits"] is not None]  # the others are being made
    known = {row["cell"] for row in there}
    rows = there + [row for row in made if row["cell"] not in known]
    out.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
