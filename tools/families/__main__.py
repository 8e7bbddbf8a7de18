"""Try every feature on every class of transformers that writes text, and write docs/families.md.

    python tools/families [KIND ...] [--features FEATURE ...] [--again]

Rows are written as they come, and a stopped run goes on where it stopped; `--again` tries once more what has a row.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from configs import Tiny, every_class
from features import FEATURES
from page import read_rows, section
from records import PAGE, all_records, page
from trying import answer, logits

ROWS = Path(__file__).parents[2] / "docs" / "families.jsonl"
SECONDS = 180  # for one feature of one class


def stands(tiny: Tiny) -> dict[str, str] | None:
    """None if the dense model runs, else why nothing can be tried."""

    def forward(tiny: Tiny) -> str:
        out = logits(tiny.make(), tiny.tokens())
        assert torch.isfinite(out).all(), "its logits are not finite"
        return "runs"

    found = answer(forward, tiny, SECONDS)
    return None if found["answer"] == "right" else {"answer": "not tried", "says": found["says"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--features", nargs="*", default=list(FEATURES), choices=list(FEATURES))
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for tiny in every_class():
        if not options.kinds or tiny.kind in options.kinds:
            try_class(tiny, options.features, options.rows, options.again)
    if options.rows == ROWS:
        rows = read_rows(ROWS)
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        PAGE.write_text(page(all_records()) + "\n" + section(rows), encoding="utf-8")


def try_class(tiny: Tiny, features: list[str], file: Path, again: bool = False) -> None:
    """Append a row for each feature that has none, or one row if the dense model does not run."""
    done = {row["feature"] for row in read_rows(file) if row["class"] == tiny.name}
    wanted = [feature for feature in features if again or feature not in done]
    if not wanted or ("dense" in done and not again):
        return
    if (reason := stands(tiny)) is not None:
        write(file, {"class": tiny.name, "feature": "dense", **reason})
        return
    for feature in wanted:
        row = {"class": tiny.name, "feature": feature, **answer(FEATURES[feature], tiny, SECONDS)}
        write(file, row)
        print(f"{tiny.name:50} {feature:22} {row['answer']:9} {row['says'][:160]}", flush=True)


def write(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
