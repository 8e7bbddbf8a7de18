"""Whether other weights for the same function lower the error of one aware mixture.

    python studies/quality/bases.py --model src/tensormix/demo/model --num-branches 4
    python studies/quality/bases.py --model ../shared/data/models/stories260K --num-branches 3 \\
        --text ../shared/data/text/tinystories_1000.json

Every linear layer of the model is fitted before and after `sort_neurons` and `align_heads`; one row per rewriting, with
the mean relative output error of each role, goes to studies/quality/bases.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormix.data import calibration_batches
from tensormix.methods import Mixt
from tensormix.models import load_model, load_tokenizer
from tensormix.reparameterise import align_heads, check_equal, sort_neurons
from tensormix.settings import Source
from tensormix.sites import find_sites
from tensormix.statistics import Gram
from tensormix.storage.files import environment, now
from tensormix.walk.fitting import observe

ROWS = Path(__file__).with_name("bases.jsonl")


def grams(model: Any, batches: list[Tensor]) -> dict[str, Gram]:
    sites = {site.name: site for site in find_sites(model) if site.kind == "linear"}
    stats: dict[str, list[dict[type, Any]]] = {n: [{Gram: Gram(s.in_features)}] for n, s in sites.items()}
    with observe(model, sites, stats):
        for batch in batches:
            model(batch)
    return {name: seen[0][Gram] for name, seen in stats.items()}


@torch.no_grad()
def measure(folder: Path, batches: list[Tensor], method: Mixt, what: str) -> dict[str, float]:
    model = load_model(folder, "float32").eval()
    before, seen = model(batches[0]).logits, grams(model, batches)
    if what in ("sorted neurons", "both"):
        sort_neurons(model)
    if what in ("aligned heads", "both"):
        align_heads(model, {name: gram.mean for name, gram in seen.items()})
    check_equal(before, model(batches[0]).logits)
    seen, errors = grams(model, batches), defaultdict(list)
    for site in find_sites(model):
        if site.name in seen:
            facts = method.fit_with_facts(site.weight, {Gram: seen[site.name]})[1]
            errors[str(site.role)].append(facts["output_error"])
    return {role: sum(values) / len(values) for role, values in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder")
    parser.add_argument("--text", type=Path, help="of the calibration; without it questions of the exam")
    parser.add_argument("--num-branches", type=int, required=True)
    asked = parser.parse_args()
    source = Source(file=str(asked.text)) if asked.text else Source(exam=True, seed=5)
    batches = calibration_batches(load_tokenizer(asked.model), source, num_windows=16, window=256, seed=0)
    method = Mixt(num_branches=asked.num_branches, init="aware")
    for what in ("as it is", "sorted neurons", "aligned heads", "both"):
        errors = measure(asked.model, batches, method, what)
        row = {"study": "bases", "model": str(asked.model.name), "weights": what, "method": method.model_dump()}
        full = {**row, "output_error": errors, "measured": now(), "environment": environment()}
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(full) + "\n")
        print(what, {role: round(value, 3) for role, value in errors.items()}, flush=True)


if __name__ == "__main__":
    main()
