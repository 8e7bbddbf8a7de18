"""The rows of an evaluated run without its single answers, and the table of docs/benchmarks.md from them.

python benchmarks/benchmark_rows.py runs/stories260k_benchmarks benchmarks/results/stories260k_benchmarks.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def blind(answers: list[Row]) -> float:
    """The accuracy of the same answers given to questions in any other order: what knowing nothing would give."""
    predicted, gold = (Counter(row[key] for row in answers) for key in ("predicted", "gold"))
    return sum(predicted[choice] * gold[choice] for choice in gold) / len(answers) ** 2


def summary(content: Row) -> list[Row]:
    """Every row but the answers; those of a whole benchmark also say what `blind` gives, and the letters' shares."""
    rows = []
    for row in content["rows"]:
        if row["kind"] == "answer":
            continue
        if row["kind"] == "accuracy" and row["subject"] == "all":
            answers = [r for r in content["rows"] if r["kind"] == "answer" and r["task"] == row["task"]]
            shares = {key: dict(sorted(Counter(r[key] for r in answers).items())) for key in ("predicted", "gold")}
            row = {**row, "blind": blind(answers), **shares}
        rows.append(row)
    return rows


def named(value: Any) -> Any:
    """Settings with the names of files instead of where they lay on that machine."""
    if isinstance(value, dict):
        return {key: named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [named(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def table(rows: list[Row]) -> str:
    lines = [
        "| benchmark | questions | asked | `acc` % | [95 %] | blind % | `acc_norm` % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] == "accuracy" and row["subject"] == "all":
            norm = f"{100 * row['acc_norm']:.1f}" if "acc_norm" in row else ""
            lines.append(
                f"| {row['task']} | {row['size']:,} | {row['num_questions']:,} | {100 * row['value']:.1f} | "
                f"{100 * row['low']:.1f} to {100 * row['high']:.1f} | {100 * row['blind']:.1f} | {norm} |"
            )
    return "\n".join(lines)


def main(folder: Path, out: Path) -> None:
    content = json.loads((folder / "evaluate.json").read_text())
    rows = summary(content)
    about = {"kind": "settings", **{key: content[key] for key in ("settings", "environment", "seconds", "finished")}}
    out.write_text("\n".join(json.dumps(row) for row in [named(about), *rows]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
