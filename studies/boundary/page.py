"""Write the tables of docs/boundary.md from the rows, and nothing that is not in them.

    python studies/boundary/page.py

Each table stands between `<!-- NAME -->` and `<!-- end -->`; `TABLES` names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tensormix.diagnose import Measurement, bisect_boundary
from tensormix.sweep.predict import SIGNALS, rank_agreement

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "boundary.md"
MARK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
EMBEDDED = "embedded"  # the model on which the predictor was written: in no error
EMBEDDED_BOUNDARY = {"last": 7 / 12, "first": 1 / 12}  # as shares of its blocks
SAID = ("all", *SIGNALS)
NAMES = {"all": "**combined rule**"}
Row = dict[str, Any]
Cases = dict[tuple[str, str], dict[str, Row]]  # (model, direction) -> kind -> row


def cases(rows: list[Row]) -> Cases:
    """By model, as they were begun, the embedded one last."""
    begun = dict.fromkeys(row["model"] for row in rows)
    order = [model for model in begun if model != EMBEDDED] + [EMBEDDED]
    found: Cases = {}
    for row in sorted(rows, key=lambda row: order.index(row["model"])):
        found.setdefault((row["model"], row["direction"]), {})[row["kind"]] = row
    return found


def judged(of: Cases) -> Cases:
    """Those of held-out models whose boundary is there and was measured."""
    return {
        key: kinds
        for key, kinds in of.items()
        if key[0] != EMBEDDED and {"prediction", "scan"} <= kinds.keys() and kinds["scan"]["boundary"]["value"]
    }


def trivial(direction: str, blocks: int) -> dict[str, int]:
    """What predictors say that look at nothing; none says less than 1."""
    return {
        "always the middle depth": blocks // 2,
        "always 7/12 of the blocks": max(1, round(blocks * EMBEDDED_BOUNDARY["last"])),
        "the embedded model's share, by direction": max(1, round(blocks * EMBEDDED_BOUNDARY[direction])),
        "the first block alone matters": blocks if direction == "last" else 1,
    }


def distance(said: int | None, measured: int, blocks: int) -> int:
    """In blocks; a predictor that says nothing says that nothing breaks, which is one depth beyond the last."""
    return abs((blocks + 1 if said is None else said) - measured)


def errors(of: Cases) -> dict[str, dict[tuple[str, str], int]]:
    """Of every predictor its error in blocks, by case."""
    found: dict[str, dict[tuple[str, str], int]] = {}
    for key, kinds in judged(of).items():
        measured, blocks = kinds["scan"]["boundary"]["value"], kinds["scan"]["blocks"]
        said = {NAMES.get(name, name): kinds["prediction"]["said"][name] for name in SAID}
        for name, depth in (said | trivial(key[1], blocks)).items():
            found.setdefault(name, {})[key] = distance(depth, measured, blocks)
    return found


def agreement(kinds: dict[str, Row], signal: str) -> float:
    """Kendall's tau-b of a signal with the loss of accuracy, over the depths that were scanned."""
    values = kinds["prediction"]["signals"][signal]
    scanned = kinds["scan"]["cells"]
    return rank_agreement([values[cell["depth"]] for cell in scanned], [cell["accuracy"] for cell in scanned])


def predictions(of: Cases) -> list[list[str]]:
    lines = [["model", "from", "blocks", "dense", "measured [95 %]", "**predicted** (range)", *SIGNALS]]
    for (model, direction), kinds in of.items():
        if not {"prediction", "scan"} <= kinds.keys():
            continue
        found, said = kinds["scan"]["boundary"], kinds["prediction"]
        where = "none" if found["value"] is None else f"{found['value']} [{found['low']} to {found['high'] or 'open'}]"
        dense = f"{kinds['scan']['cells'][0]['accuracy']:.3f}"
        predicted = f"**{said['said']['all']}** ({said['low']} to {said['high']})"
        each = [str(said["said"].get(signal, "")) for signal in SIGNALS]
        lines.append([model, direction, str(kinds["scan"]["blocks"]), dense, where, predicted, *each])
    return lines


def errors_table(of: Cases) -> list[list[str]]:
    directions = list(dict.fromkeys(direction for _, direction in judged(of)))
    head = ["predictor"]
    for direction in directions:
        head += [f"{direction}: mean error", "within 1"]
    lines = [[*head, "both: mean error", "within 1", "Kendall's tau, last", "first"]]
    for name, by_case in errors(of).items():
        line = [name]
        for wanted in (*([d] for d in directions), directions):
            here = [error for (_, direction), error in by_case.items() if direction in wanted]
            line += [f"{fmean(here):.2f}", f"{sum(e <= 1 for e in here)} of {len(here)}"]
        for direction in ("last", "first"):
            taus = [agreement(k, name) for (_, d), k in judged(of).items() if d == direction and name in SIGNALS]
            line.append(f"{fmean(taus):.2f}" if taus else "")
        lines.append(line)
    return lines


def accuracies(of: Cases) -> list[list[str]]:
    deepest = max(row["blocks"] for kinds in of.values() for row in kinds.values())
    lines = [["model", "from", *map(str, range(deepest + 1))]]
    for (model, direction), kinds in of.items():
        if "scan" in kinds:
            measured = {cell["depth"]: f"{100 * cell['accuracy']:.0f}" for cell in kinds["scan"]["cells"]}
            boundary = kinds["scan"]["boundary"]["value"]
            cells = [f"**{measured[d]}**" if d == boundary else measured.get(d, "") for d in range(deepest + 1)]
            lines.append([model, direction, *cells])
    return lines


def recovered(kinds: dict[str, Row], kind: str) -> tuple[int, int]:
    """Recovered checkpoints and recovery steps of a search."""
    made = [cell for cell in kinds[kind]["cells"] if cell["depth"]]
    return len(made), sum(cell["steps"] for cell in made)


def savings(of: Cases) -> list[list[str]]:
    lines = [["model", "from", "scan: checkpoints, steps", "bisection", "its share", "with early stop", "its share"]]
    lines[0] += ["predictor's share of the time", "boundary: scan", "bisection", "early stop"]
    shares: dict[str, list[float]] = {"bisect": [], "early_stop": [], "time": []}
    for (model, direction), kinds in of.items():
        if not {"prediction", "scan", "bisect"} <= kinds.keys():
            continue
        count, whole = recovered(kinds, "scan")
        line = [model, direction, f"{count}, {whole}"]
        for kind in ("bisect", "early_stop"):
            made, steps = recovered(kinds, kind) if kind in kinds else (0, 0)
            line += [f"{made}, {steps}", f"{steps / whole:.2f}"] if made else ["", ""]
            shares[kind] += [steps / whole] if made else []
        if kinds["scan"]["seconds"]:  # of the embedded model it was not recorded for one direction alone
            shares["time"].append(kinds["prediction"]["seconds"] / kinds["scan"]["seconds"])
        line.append(f"{shares['time'][-1]:.2f}" if kinds["scan"]["seconds"] else "")
        line += [str(kinds[k]["boundary"]["value"]) if k in kinds else "" for k in ("scan", "bisect", "early_stop")]
        lines.append(line)
    bisection, early = (f"{fmean(shares[kind]):.2f}" if shares[kind] else "" for kind in ("bisect", "early_stop"))
    time = f"{median(shares['time']):.2f}" if shares["time"] else ""  # others took the processor now and then
    lines.append(["mean (of the time the median)", "", "", "", bisection, "", early, time, "", "", ""])
    return lines


def larger(of: Cases) -> list[list[str]]:
    """Calls of bisection on an abrupt fall at every depth; no model is involved."""
    lines = [["blocks", "checkpoints on average", "most", "share of a scan"]]
    for blocks in (12, 24, 32, 80):
        counts = [_calls(blocks, place) for place in range(1, blocks + 1)]
        mean = fmean(counts)
        lines.append([str(blocks), f"{mean:.1f}", str(max(counts)), f"{mean / blocks:.2f}"])
    return lines


def _calls(blocks: int, place: int) -> int:
    """Recovered checkpoints that bisection asks for where accuracy falls from 0.9 to 0.25 at depth `place`."""
    asked: list[int] = []

    def measure(depth: int) -> Measurement:
        asked.append(depth)
        return Measurement(depth=depth, accuracy=0.9 if depth < place else 0.25, num_questions=400)

    bisect_boundary(measure, blocks, num_resamples=1)
    return len([depth for depth in asked if depth])


TABLES: dict[str, Callable[[Cases], list[list[str]]]] = {
    "predictions": predictions,
    "errors": errors_table,
    "accuracies": accuracies,
    "savings": savings,
    "larger": larger,
}


def fill(page: str, rows: list[Row]) -> str:
    """The page with its tables."""

    def replaced(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"boundary page: no table {match[2]!r}; there are {', '.join(TABLES)}")
        head, *lines = TABLES[match[2]](cases(rows))
        table = [head, ["---"] * len(head), *lines]
        return match[1] + "".join("| " + " | ".join(line) + " |\n" for line in table) + match[3]

    return MARK.sub(replaced, page)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), read(HERE / "results.jsonl")))
