"""What each method makes of a real language model, without recovery: one row for each method and budget.

    python studies/rivals/study.py --model build/smollm2 --data ../shared/data

Every method gets the same share of the numbers of every layer that it replaces, and the same calibration text (C4).
Perplexity is that of 6,144 tokens of WikiText-2 and of C4 in windows of 1,024, in float32; the tokens of C4 come from
other documents than the calibration. The five tasks are asked without examples, 200 questions of each, in bfloat16,
which many CPUs multiply several times as fast. Rows are appended to results.jsonl; one that is there is not measured
again.
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
from tensormix.data import packed_source
from tensormix.evaluate.harness import ask
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.settings import Benchmark, Source
from tensormix.storage.files import environment, now

HERE = Path(__file__).parent
TOKENS, LONG = 6144, 1024  # judged, and in one window
CALIBRATION, WINDOW = 16, 512  # windows, and their length
TEXTS = {"wikitext2": ("text/wikitext2_test.raw", {}), "c4": ("text/c4_300.jsonl", {"num_documents": 40})}
TASKS = {
    "hellaswag": "hellaswag_val1000",
    "piqa": "piqa_val",
    "arc_challenge": "arc_challenge_test",
    "openbookqa": "openbookqa_test",
    "winogrande": "winogrande_val",
}
QUESTIONS = 200  # of each task


def asked(model: Any, tokenizer: Any, data: Path) -> dict[str, Any]:
    """The accuracy of each task, by the likelihood of whole answers, and the mean of all."""
    found = {}
    for name, file in TASKS.items():
        task = Benchmark(name=name, file=str(data / "bench" / f"{file}.jsonl"), num_questions=QUESTIONS)
        found[name] = ask(model, tokenizer, task, batch_size=4)[0]["value"]
    return {"tasks": found, "tasks_mean": sum(found.values()) / len(found)}


@torch.no_grad()
def judged(model: Any, tokenizer: Any, data: Path) -> dict[str, Any]:
    """Perplexity of both texts, and the loss of each of their windows."""
    found: dict[str, Any] = {}
    for name, (file, options) in TEXTS.items():
        ids = packed_source(tokenizer, Source(file=str(data / file), **options))[:TOKENS].view(-1, LONG)
        losses = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
        found |= {name: math.exp(sum(losses) / len(losses)), f"{name}_windows": [round(loss, 3) for loss in losses]}
    return found


def calibration(tokenizer: Any, data: Path) -> list[torch.Tensor]:
    """Windows of documents that come after those that are judged."""
    texts = [json.loads(line)["text"] for line in (data / "text/c4_300.jsonl").read_text().splitlines()[40:]]
    ids = torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"])
    return list(ids[: CALIBRATION * WINDOW].view(CALIBRATION, 1, WINDOW))


def rules(variant: dict[str, Any], keep: float) -> list[dict[str, Any]]:
    """The rules of a variant: where a size says `keep`, it is this one."""
    text = json.dumps(variant["rules"]).replace('"keep"', "@").replace("@:", '"keep":')
    return json.loads(text.replace("@", str(keep)))


def measure(variant: dict[str, Any], keep: float, options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(options.model, dtype="float32"), load_tokenizer(options.model)
    before, began = sum(p.numel() for p in model.parameters()), time.perf_counter()
    rows = tensormix.compress(
        model, Plan.model_validate(rules(variant, keep)), calibration(tokenizer, options.data)
    ) if variant["rules"] else []  # fmt: skip
    seconds = time.perf_counter() - began
    parameters = {
        "sites": sum(row["parameters"] for row in rows),
        "dense_sites": sum(row["dense_parameters"] for row in rows),
        "bits": sum(row["bits"] for row in rows),
        "model": sum(p.numel() for p in model.parameters()),
        "dense_model": before,
    }
    if any(row["role"] for row in rows):  # not where blocks are dropped: they have no dense form
        model.dequantize()  # the same matrices written out: some structures take minutes to read 12,000 tokens
    facts = {"parameters": parameters, "seconds": round(seconds, 1), **judged(model, tokenizer, options.data)}
    facts |= asked(model.bfloat16(), tokenizer, options.data)
    what = {"variant": variant["name"], "keep": keep, "rules": rules(variant, keep)}
    return {**what, **facts, "model": options.model.name, "environment": environment(), "finished": now()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--budgets", nargs="*", type=float, help="instead of those of study.yaml")
    options = parser.parse_args()
    settings = yaml.safe_load((HERE / "study.yaml").read_text())
    file = HERE / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    there = {(row["variant"], row["keep"]) for row in map(json.loads, lines)}
    for keep in options.budgets or settings["budgets"]:
        for variant in settings["variants"]:
            once = keep if variant["rules"] else 1.0
            wanted = not options.only or variant["name"] in options.only
            if (variant["name"], once) in there or not wanted or once not in variant.get("budgets", [once]):
                continue
            print(variant["name"], once, flush=True)
            try:
                row = measure(variant, once, options)
            except ValueError as reason:
                row = {"variant": variant["name"], "keep": once, "refused": str(reason), "finished": now()}
            print({key: row.get(key) for key in ("wikitext2", "c4", "tasks_mean", "seconds", "refused")}, flush=True)
            with file.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
            there.add((variant["name"], once))


if __name__ == "__main__":
    main()
