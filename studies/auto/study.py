"""What a budget over several methods at once keeps of real language models, beside each of the methods alone.

    python studies/auto/study.py --model smollm2 --models ../models --data ../shared/data

The settings of each model are in study.yaml. First `auto` decides on the plan, from the calibration windows alone; then
the plan that it chose, and with `--plans` others that it was measured against, are compressed anew on all calibration
windows and judged by the perplexity of texts that it has not seen. Rows are appended to results.jsonl: one for the
decision ("allocate", with every candidate and every contender) and one for each plan ("judged"). What is there is not
done again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import tensormix
from tensormix.allocation import allocate
from tensormix.data import packed_source
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.settings import Budget, Source
from tensormix.storage.files import environment, now

HERE = Path(__file__).parent


def ids_of(tokenizer: Any, text: dict[str, Any], data: Path) -> torch.Tensor:  # (N,)
    """The tokens of a text of study.yaml."""
    source = {key: value for key, value in text.items() if key in ("file", "num_documents")}
    return packed_source(tokenizer, Source(**{**source, "file": str(data / text["file"])}))


def calibration(tokenizer: Any, settings: dict[str, Any], data: Path) -> list[torch.Tensor]:  # (1, T) each
    """Windows of documents that come after those that are judged."""
    file = data / settings["file"]
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else json.loads(file.read_text())
    texts = [json.loads(line)["text"] if file.suffix == ".jsonl" else line for line in lines]
    texts = [text if isinstance(text, str) else text["story"] for text in texts[settings["skip"] :]]
    ids = torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"])
    windows, length = settings["windows"], settings["window"]
    return list(ids[: windows * length].view(windows, 1, length))


@torch.no_grad()
def judged(model: Any, tokenizer: Any, texts: dict[str, Any], data: Path) -> dict[str, float]:
    """The perplexity of each text, in windows without context before them."""
    found = {}
    for name, text in texts.items():
        ids = ids_of(tokenizer, text, data)[: text["tokens"]].view(-1, text["window"])
        losses = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
        found[name] = math.exp(sum(losses) / len(losses))
    return found


def decide(path: Path, settings: dict[str, Any], keep: float, data: Path) -> dict[str, Any]:
    """The row of the decision, with every plan that was measured."""
    tokenizer, began = load_tokenizer(path), time.perf_counter()

    def tell(done: int, total: int, name: str) -> None:
        if done % 50 == 0 or name.startswith("plan"):
            print(f"{time.perf_counter() - began:7.1f} s  {done} of {total}  {name}", flush=True)

    plan = {"method": {"name": "auto", **settings["auto"]}}
    budget, batches = Budget(keep=keep, of="parameters"), calibration(tokenizer, settings["calibration"], data)
    found = allocate(path, plan, budget, batches, tell, dtype="float32")
    row = {"kind": "allocate", "keep": keep, "settings": settings, "seconds": round(time.perf_counter() - began, 1)}
    return row | {"rows": found.rows, "plans": {name: p.model_dump(mode="json") for name, p in found.others.items()}}


def judge(path: Path, settings: dict[str, Any], plan: Plan | None, data: Path) -> dict[str, Any]:
    model: Any = load_model(path, dtype="float32")
    tokenizer, began = load_tokenizer(path), time.perf_counter()
    batches = calibration(tokenizer, settings["calibration"], data)
    rows = [] if plan is None else tensormix.compress(model, plan, batches)
    seconds = round(time.perf_counter() - began, 1)
    numbers = {
        "sites": sum(row["parameters"] for row in rows),
        "dense_sites": sum(row["dense_parameters"] for row in rows),
        "model": sum(parameter.numel() for parameter in model.parameters()),
    }
    return {"parameters": numbers, "seconds": seconds, **judged(model, tokenizer, settings["texts"], data)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("../models"), help="folder of the models' folders")
    parser.add_argument("--model", required=True, help="a name in study.yaml")
    parser.add_argument("--keep", type=float, nargs="*", help="instead of those of study.yaml")
    parser.add_argument("--plans", nargs="*", default=[], help="contenders that are judged too, beside the chosen one")
    options = parser.parse_args()
    settings = yaml.safe_load((HERE / "study.yaml").read_text())["models"][options.model]
    path = options.models / options.model

    file = HERE / "results.jsonl"
    there = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    there = [row for row in there if row["model"] == options.model]

    def write(row: dict[str, Any]) -> dict[str, Any]:
        whole = {"model": options.model, **row, "environment": environment(), "finished": now()}
        with file.open("a") as rows:
            rows.write(json.dumps(whole) + "\n")
        print({key: value for key, value in row.items() if not isinstance(value, list | dict)}, flush=True)
        return whole

    for keep in options.keep or settings["budgets"]:
        known = [row for row in there if row["kind"] == "allocate" and row["keep"] == keep]
        decided = known[0] if known else write(decide(path, settings, keep, options.data))
        contenders = [row for row in decided["rows"] if row["kind"] == "contender"]
        chosen = next(row["contender"] for row in contenders if row["chosen"])
        for name, plan in {"dense": None, **decided["plans"]}.items():
            judged_before = any(row["kind"] == "judged" and (row["keep"], row["plan"]) == (keep, name) for row in there)
            if name in ("dense", chosen, *options.plans) and not judged_before:
                row = {"kind": "judged", "keep": keep, "plan": name, "chosen": name == chosen}
                rules = None if plan is None else Plan.model_validate(plan)
                write(row | judge(path, settings, rules, options.data))


if __name__ == "__main__":
    main()
