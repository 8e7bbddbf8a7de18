"""How far predictions are from boundaries that were measured, on models that the package was not made with; and what
bisection and early stopping save.

    python studies/boundary/study.py --work WORK [--only NAME]

For every model of models.yaml (trained where it is not there yet) and both directions, in this order, so that nothing
measured can be known to what is predicted: a row of kind "prediction", before any recovery; "scan", every depth
compressed with MixT and recovered; "bisect", the cells of it that bisection asks for; "early_stop", those again with
recoveries that end when their outcome is clear. Of the embedded model the scan is the demo's, the prediction that of
studies/quality. Rows are appended to results.jsonl; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from tasks import documents, questions
from train import make

from tensormix.demo import sweep_file
from tensormix.diagnose import Measurement, bisect_boundary, find_boundary
from tensormix.recipe import Direction, Sweep
from tensormix.run.keys import stage_rows
from tensormix.storage.files import environment, now, read_json
from tensormix.sweep.depths import run_sweep
from tensormix.sweep.predict import predict

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "benchmarks" / "results" / "demo.jsonl"
PREDICTIONS = HERE.parent / "quality" / "predictions.jsonl"
RESULTS = HERE / "results.jsonl"
KINDS = ("prediction", "scan", "bisect", "early_stop")
DIRECTIONS: tuple[Direction, ...] = ("last", "first")
EARLY = {"save_every": 5, "early_stop": {"num_questions": 200}}
NUM_QUESTIONS, RECOVERY_TEXTS = 400, 4000
Row = dict[str, Any]


def settings_of(folder: Path, length: int) -> Row:
    """The sweep of a held-out model: a short recovery, as in the demo, from the dense model's logits."""
    recover = {
        "text": [{"file": str(folder / "recovery.jsonl")}],
        "steps": 20,
        "batch_size": 32,
        "window": length,
        "learning_rate": 1e-3,
        "warmup": 0.1,
        "loss": "kl",
    }
    exam = {"file": str(folder / "questions.jsonl"), "num_questions": NUM_QUESTIONS}
    recipe = {"model": str(folder), "recover": recover, "evaluate": {"exam": exam, "batch_size": 200}}
    return {"recipe": {**recipe, "diagnose": None, "profile": None}, "vary": {"num_branches": [4]}}


def write_texts(folder: Path, tasks: list[str], seed: int) -> int:
    """The questions and the recovery texts of a model; returns the tokens of one text, <s> included."""
    lines = islice(questions(tasks, seed), NUM_QUESTIONS)
    rows = [{"text": text, "gold": gold, "subject": task} for task, text, gold in lines]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = list(islice(documents(tasks, 1000 + seed), RECOVERY_TEXTS))
    (folder / "recovery.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return len(texts[0].split()) + 1


def with_early_stop(settings: Row) -> Row:
    recover = {**settings["recipe"]["recover"], **EARLY}
    return {**settings, "recipe": {**settings["recipe"], "recover": recover}, "search": "bisect"}


def cells(folder: Path, steps: int) -> list[Row]:
    """Depth, accuracy and recovery steps of every cell that a sweep has in its sweep.json; depth 0 is the dense one."""
    found = []
    for cell in read_json(folder / "sweep.json")["cells"]:
        one = folder / cell["folder"]
        (accuracy,) = [r for r in stage_rows(one, "evaluate") if r["kind"] == "accuracy" and r["subject"] == "all"]
        row = {"depth": cell["depth"], "accuracy": accuracy["value"], "num_questions": accuracy["num_questions"]}
        asked = [r for r in stage_rows(one, "recover") if r["kind"] == "early_stop"] if cell["depth"] else []
        ended = [r for r in asked if r["outcome"] != "open"]
        row |= {"steps": 0 if not cell["depth"] else ended[0]["step"] if ended else steps, "asked": len(asked)}
        found.append(row | {"outcome": ended[0]["outcome"] if ended else None})
    return sorted(found, key=lambda row: row["depth"])


def boundary(of: list[Row]) -> Row:
    measured = [Measurement(**{key: row[key] for key in ("depth", "accuracy", "num_questions")}) for row in of]
    return find_boundary(measured).row()


def demo_scan(direction: str, steps: int) -> Row:
    """The scan of the demo in one direction; the demo's cells of direction `first` are three of twelve."""
    rows = [row for row in map(json.loads, DEMO.read_text().splitlines()) if "depth" in row]
    wanted = [r for r in rows if r["method"] == "dense" or (r["method"], r["direction"]) == ("mixt", direction)]
    keys = ("depth", "accuracy", "num_questions")
    found = [{key: row[key] for key in keys} | {"steps": steps if row["depth"] else 0} for row in wanted]
    own = {"from": DEMO.name, "seconds": None, "environment": wanted[0]["environment"]}
    return {"cells": found, "boundary": boundary(found), **own}


def recorded_prediction(direction: str) -> Row:
    """What studies/quality/predictor.py said of the embedded model, before the effective rank was a signal."""
    row = [row for row in read(PREDICTIONS) if row["direction"] == direction][-1]
    signals: dict[str, list[float]] = {}
    for signal in row["signals"]:
        signals.setdefault(signal["signal"], []).append(signal["value"])
    found = {"said": {**row["by_signal"], "all": row["predicted"]}, "low": row["low"], "high": row["high"]}
    own = {key: row[key] for key in ("seconds", "environment", "finished")}
    return {**found, "signals": signals, "from": PREDICTIONS.name, **own}


class Study:
    """The rows of one model and direction."""

    def __init__(self, name: str, direction: str, settings: Row, work: Path, num_blocks: int) -> None:
        self.name, self.direction, self.work, self.num_blocks = name, direction, work, num_blocks
        self.settings = {key: value for key, value in settings.items() if key != "baselines"}
        self.settings |= {"directions": [direction]}
        self.steps = settings["recipe"]["recover"]["steps"]

    def sweep(self, settings: Row) -> Sweep:
        if self.name != "embedded":
            return Sweep.model_validate(settings)
        return Sweep.model_validate(settings | {"recipe": {**settings["recipe"], "model": str(EMBEDDED)}})

    def prediction(self) -> Row:
        if self.name == "embedded":
            return recorded_prediction(self.direction)
        rows = predict(self.sweep(self.settings), direction=self.direction)  # type: ignore[arg-type]
        said = {row["signal"]: row["depth"] for row in rows if row["kind"] == "prediction"}
        together = next(row for row in rows if row["kind"] == "prediction" and row["signal"] == "all")
        signals: dict[str, list[float]] = {}
        for row in rows:
            if row["kind"] == "signal":
                signals.setdefault(row["signal"], []).append(row["value"])
        return {"said": said, "low": together["low"], "high": together["high"], "signals": signals}

    def scan(self) -> Row:
        if self.name == "embedded":
            return demo_scan(self.direction, self.steps)
        run_sweep(self.sweep(self.settings), self.work / "scan")
        found = cells(self.work / "scan", self.steps)
        return {"cells": found, "boundary": boundary(found)}

    def bisect(self) -> Row:
        """The cells of the scan that bisection asks for: the same recipe makes the same cell."""
        (scan,) = [r for r in read(RESULTS) if label(r) == (self.name, self.direction, "scan")]
        recorded = {cell["depth"]: cell for cell in scan["cells"]}
        asked: list[int] = []

        def measure(depth: int) -> Measurement:
            asked.append(depth)
            return Measurement(**{key: recorded[depth][key] for key in ("depth", "accuracy", "num_questions")})

        bisect_boundary(measure, self.num_blocks)
        found = [recorded[depth] for depth in sorted(asked)]
        return {"cells": found, "boundary": boundary(found)}

    def early_stop(self) -> Row:
        run_sweep(self.sweep(with_early_stop(self.settings)), self.work / "early")
        found = cells(self.work / "early", self.steps)
        return {"cells": found, "boundary": boundary(found)}


EMBEDDED = sweep_file().parent / "model"


def label(row: Row) -> tuple[str, str, str]:
    return row["model"], row["direction"], row["kind"]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def relative(settings: Any, work: Path) -> Any:
    """Settings for a row: paths below the working folder without it."""
    return json.loads(json.dumps(settings).replace(str(work) + "/", ""))


def study(name: str, work: Path, about: Row | None, kinds: Sequence[str]) -> None:
    """The rows of one model that are missing; `about` is its entry in models.yaml, None for the embedded one."""
    folder = (work / name).resolve()
    if about is None:
        settings = yaml.safe_load(sweep_file().read_text())
        settings["recipe"] |= {"diagnose": None, "profile": None}
        settings["recipe"]["evaluate"].pop("perplexity")
        num_blocks = 12
    else:
        make(name, about, work)
        settings, num_blocks = settings_of(folder, write_texts(folder, about["tasks"], about["seed"])), about["blocks"]
    for direction in DIRECTIONS:
        one = Study(name, direction, settings, folder / direction, num_blocks)
        for kind in kinds:
            unknown = name == "embedded" and direction == "first" and kind in ("bisect", "early_stop")
            if unknown or (name, direction, kind) in map(label, read(RESULTS)):
                continue
            began = time.perf_counter()
            found = getattr(one, kind)()
            row = {"model": name, "direction": direction, "kind": kind, "blocks": num_blocks}
            row |= {"seconds": round(time.perf_counter() - began, 1), "environment": environment(), "finished": now()}
            row |= {"settings": relative(one.settings, work.resolve()), **found}  # what was recorded keeps its own
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, direction, kind, row.get("said", row.get("boundary", {}).get("value")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="predictions beside measured boundaries, and what a search saves")
    parser.add_argument("--work", type=Path, required=True, help="folder of the models and the sweeps")
    parser.add_argument("--only", nargs="+", help="names of models; all without it")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of rows; all without it")
    args = parser.parse_args()
    models = yaml.safe_load((HERE / "models.yaml").read_text())
    unknown = sorted(set(args.only or ()) - {"embedded", *models})
    if unknown:
        parser.error(f"there is no model {', '.join(unknown)}; there are embedded, {', '.join(models)}")
    for name in args.only or ["embedded", *models]:
        study(name, args.work, models.get(name), args.kinds)


if __name__ == "__main__":
    main()
