"""How far the predictor is from boundaries that were measured: the sweeps of the embedded model.

    python studies/quality/predictor.py

The measured accuracies are the rows of benchmarks/results/demo.jsonl (the demo's sweep). A row is appended to
predictions.jsonl for each direction, with its environment.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from tensormix.demo import sweep_file
from tensormix.diagnose import Measurement, find_boundary
from tensormix.recipe import Sweep
from tensormix.storage.files import environment, now
from tensormix.sweep.predict import SIGNALS, predict, rank_agreement

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "benchmarks" / "results" / "demo.jsonl"


def measured(direction: str) -> dict[int, tuple[float, int]]:
    """Accuracy and number of questions by depth, depth 0 included."""
    rows = [row for row in map(json.loads, DEMO.read_text().splitlines()) if "depth" in row]
    wanted = [r for r in rows if r["method"] == "dense" or (r["method"], r["direction"]) == ("mixt", direction)]
    return {row["depth"]: (row["accuracy"], row["num_questions"]) for row in wanted}


def main() -> None:
    sweep = Sweep.load(sweep_file())
    for direction in ("last", "first"):
        truth, began = measured(direction), time.perf_counter()
        rows = predict(sweep, direction=direction)
        seconds = time.perf_counter() - began
        accuracies = [Measurement(depth=d, accuracy=a, num_questions=n) for d, (a, n) in truth.items()]
        boundary = find_boundary(accuracies)
        said = {row["signal"]: row for row in rows if row["kind"] == "prediction"}
        depths = sorted(truth)
        agreement = {}
        for signal in SIGNALS:
            value = {row["depth"]: row["value"] for row in rows if row["kind"] == "signal" and row["signal"] == signal}
            agreement[signal] = rank_agreement([value[d] for d in depths], [truth[d][0] for d in depths])
        row = {
            "model": "embedded",
            "direction": direction,
            "measured": boundary.value,
            "predicted": said["all"]["depth"],
            "low": said["all"]["low"],
            "high": said["all"]["high"],
            "by_signal": {signal: said[signal]["depth"] for signal in SIGNALS},
            "rank_agreement": agreement,
            "depths_measured": depths,
            "signals": [row for row in rows if row["kind"] == "signal"],
            "seconds": seconds,
            "environment": environment(),
            "finished": now(),
        }
        with (HERE / "predictions.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: row[key] for key in ("direction", "measured", "predicted", "low", "high", "by_signal", "seconds")})
        print(agreement)


if __name__ == "__main__":
    main()
