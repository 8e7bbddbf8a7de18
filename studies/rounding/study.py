"""What rounding below 4 bits makes of a real language model, without recovery: one row for each variant.

    python studies/rounding/study.py --model build/smollm2 --data ../shared/data

Calibration and judging are those of studies/rivals/study.py: 16 windows of 512 tokens of C4; perplexity of 6,144 tokens
of WikiText-2 and of C4, other documents, in windows of 1,024, in float32. Bits are those of everything that is stored
for the layers of the blocks (integers, scales, zero points, factors, positions), for each number of the dense layers;
embeddings and norms stay as they are. Rows are appended to results.jsonl; one that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import runpy
import time
from pathlib import Path
from typing import Any

import yaml

import tensormix
from tensormix.allocation import allocate
from tensormix.models import ModelSource, load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.settings import Budget
from tensormix.storage.files import environment, now

HERE = Path(__file__).parent
RIVALS = runpy.run_path(str(HERE.parent / "rivals" / "study.py"))


def measure(variant: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(options.model, dtype="float32"), load_tokenizer(options.model)
    batches, began, sizes = RIVALS["calibration"](tokenizer, options.data), time.perf_counter(), None
    if "budget" in variant:
        budget = Budget.model_validate(variant["budget"])
        found = allocate(
            ModelSource(options.model), Plan.model_validate(variant["rules"]), budget, batches, dtype="float32"
        )
        plan, sizes = found.plan, {row["site"]: row["size"] for row in found.rows[1:]}
    else:
        plan = Plan.model_validate(variant["rules"])
    rows = tensormix.compress(model, plan, batches)
    seconds = time.perf_counter() - began
    numbers, bits = (sum(row[key] for row in rows) for key in ("dense_parameters", "bits"))
    model.dequantize()  # the same matrices written out, which are read faster
    return {
        **variant,
        "sizes": sizes,
        "bits": bits,
        "bits_per_number": bits / numbers,
        "numbers": numbers,
        "nearest": sum(row.get("rounding") == "nearest" for row in rows),
        "sites": len(rows),
        "seconds": round(seconds, 1),
        **RIVALS["judged"](model, tokenizer, options.data),
        "model": options.model.name,
        "environment": environment(),
        "finished": now(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    file = HERE / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    there = {json.loads(line)["name"] for line in lines}
    for variant in yaml.safe_load((HERE / "study.yaml").read_text())["variants"]:
        if variant["name"] in there or (options.only and variant["name"] not in options.only):
            continue
        print(variant["name"], flush=True)
        row = measure(variant, options)
        print({key: row[key] for key in ("bits_per_number", "wikitext2", "c4", "nearest", "seconds")}, flush=True)
        with file.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
