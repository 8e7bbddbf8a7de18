"""One row per cell of a finished sweep, with environment, and the table of the README from the same rows.

python benchmarks/demo_rows.py runs/demo benchmarks/results/demo.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def cell_row(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    def rows(stage: str) -> list[dict[str, Any]]:
        file = folder / cell["folder"] / f"{stage}.json"
        return json.loads(file.read_text())["rows"] if file.exists() else []

    evaluate, diagnose, profile = rows("evaluate"), rows("diagnose"), rows("profile")
    overall = next(row for row in evaluate if row["kind"] == "accuracy" and row["subject"] == "all")
    row = {key: cell[key] for key in ("cell", "depth", "direction", "method", "num_branches")}
    row |= {"accuracy": overall["value"], "low": overall["low"], "high": overall["high"]}
    row |= {"num_questions": overall["num_questions"]}
    row |= {f"perplexity_{r['text']}": r["value"] for r in evaluate if r["kind"] == "perplexity"}
    row |= {r["kind"]: r["value"] for r in diagnose if r["kind"] in ("output_entropy", "prediction_entropy")}
    for r in profile:
        if r["model"] == "compressed" and r["kind"] == "resources":
            row |= {key: r[key] for key in ("parameters", "macs_per_token", "bytes_on_disk", "peak_memory_bytes")}
        if r["model"] == "compressed" and r["kind"] == "latency":
            row[f"speedup_{r['tokens']}_tokens"] = r["speedup"]
    row["environment"] = json.loads((folder / cell["folder"] / "evaluate.json").read_text())["environment"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    def find(method: str, depth: int, direction: str = "last") -> str:
        found = [r for r in rows if (r["method"], r["depth"], r["direction"]) == (method, depth, direction)]
        return f"{100 * found[0]['accuracy']:.1f}" if found else ""

    lines = [
        "| N_B | accuracy % | [95 %] | OE | PE | parameters | MACs | front to back | blocks dropped | blocks zeroed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["direction"] == "last" and row["method"] in ("dense", "mixt"):
            size = f"{row['parameters']:,} | {row['macs_per_token']:,}" if "parameters" in row else "dense | dense"
            lines.append(
                f"| {row['depth']} | {100 * row['accuracy']:.1f} | {100 * row['low']:.0f} to {100 * row['high']:.0f} | "
                f"{row['output_entropy']:.2f} | {row['prediction_entropy']:.3f} | {size} | "
                f"{find('mixt', row['depth'], 'first')} | {find('drop_blocks', row['depth'])} | "
                f"{find('zero', row['depth'])} |"
            )
    return "\n".join(lines)


def main(folder: Path, out: Path) -> None:
    sweep = json.loads((folder / "sweep.json").read_text())
    rows = [cell_row(folder, cell) for cell in sweep["cells"]]
    text = "\n".join(json.dumps(row) for row in rows + [row | {"cell": "boundary"} for row in sweep["boundary"]])
    out.write_text(text + "\n")
    print(table(rows))
    for row in sweep["boundary"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
