"""What each structure loses on the layers of a model, at equal stored numbers, before any recovery.

    python studies/quality/structures.py --model src/tensormix/demo/model --blocks 3 9
    python studies/quality/structures.py --model ../shared/data/models/stories260K --blocks 1 3 \\
        --text ../shared/data/text/tinystories_1000.json
    python studies/quality/structures.py --summary

For every linear layer of the blocks and every `--keep`, each structure gets the largest sizes that store no more than
`keep` of the layer's numbers, and is fitted to the Gram matrix of the dense model's inputs. A row holds the relative
output error on those inputs and on as many that were not seen, and the error of whitened low rank of at least as many
numbers (its rank rounded up). Rows go to studies/quality/structures.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormix.compression.observing import observe
from tensormix.data import calibration_batches
from tensormix.fitting.whitening import gram_root
from tensormix.methods import (
    LinearMethod,
    Mixt,
    MixtChain,
    MixtLowRank,
    MixtRotated,
    MixtSparse,
    MonarchMethod,
    SvdLlm,
    split_search,
)
from tensormix.models import load_model, load_tokenizer
from tensormix.settings import Source
from tensormix.sites import Site, find_sites
from tensormix.statistics import Gram
from tensormix.storage.files import environment, now

ROWS = Path(__file__).with_name("structures.jsonl")
WINDOW, WINDOWS, STEPS = 256, 16, 100  # tokens; of calibration, and as many for the test; of L-BFGS


def largest(candidates: Iterator[LinearMethod], site: Site, keep: float) -> LinearMethod | None:
    """The candidate with the most numbers within the budget."""
    sized = []
    for method in candidates:
        try:
            numbers = method.empty(site.in_features, site.out_features).num_params
        except ValueError:
            continue
        if numbers <= keep * site.weight.numel():
            sized.append((numbers, len(sized), method))
    return max(sized)[2] if sized else None


def structures(site: Site, keep: float, stats: dict[type, Any]) -> Iterator[tuple[str, LinearMethod | None]]:
    def fits(*candidates: LinearMethod) -> LinearMethod | None:
        return largest(iter(candidates), site, keep)

    branches = range(2, 9)
    yield "low rank", fits(SvdLlm(keep=keep))
    yield "mixt, matched", fits(*(Mixt(num_branches=n) for n in branches))
    yield "mixt, aware", fits(*(Mixt(num_branches=n, init="aware") for n in branches))
    for name, kind in (("mixt + low rank", MixtLowRank), ("mixt + sparse", MixtSparse)):
        errors = split_search(kind(keep=keep, num_branches=1), site.weight, stats)
        best = min(errors, key=lambda n: errors[n] or 0.0, default=None)
        yield name, None if best is None else kind(keep=keep, num_branches=best)
    chains = [
        MixtChain(num_branches=n, num_factors=k, shuffle=s, steps=STEPS)
        for k, n, s in product((2, 3), branches, (1, 2))
    ]
    yield "chain", fits(*(chain for chain in chains if chain.shuffle == 1))
    yield "chain, shuffled", fits(*(chain for chain in chains if chain.shuffle == 2))
    yield "mixt, rotated", fits(*(MixtRotated(num_branches=n, outer=o, steps=STEPS) for n in branches for o in (4, 8)))
    yield "monarch", fits(*(MonarchMethod(keep=keep, blocks=b, steps=STEPS) for b in (2, 4)))


def error(weight: Tensor, found: Tensor, gram: Tensor) -> float:  # (O, I), (O, I), (I, I)
    left_over = weight - found
    return float(((left_over @ gram * left_over).sum() / (weight @ gram * weight).sum()).clamp_min(0).sqrt())


@torch.no_grad()
def measure(site: Site, keep: float, seen: dict[type, Any], unseen: Gram) -> Iterator[dict[str, Any]]:
    weight, gram = site.weight.double(), seen[Gram].mean
    values = torch.linalg.svdvals(weight @ gram_root(gram)).square()
    for structure, method in structures(site, keep, seen):
        if method is None:
            continue
        start = time.perf_counter()
        operator = method.fit(site.weight, seen)
        seconds = time.perf_counter() - start
        rank = ceil(operator.num_params / sum(weight.shape))
        yield {
            "site": site.name,
            "role": site.role,
            "keep": keep,
            "structure": structure,
            "method": method.model_dump(),
            "numbers": operator.num_params,
            "kept": operator.num_params / weight.numel(),
            "bits": operator.num_bits,
            "macs_per_token": operator.macs_per_token,
            "output_error": error(weight, operator.to_dense().double(), gram),
            "unseen_output_error": error(weight, operator.to_dense().double(), unseen.mean),
            "rival_rank": rank,
            "rival_output_error": float((values[rank:].sum() / values.sum()).sqrt()),
            "seconds": round(seconds, 2),
        }


def grams(model: Any, sites: dict[str, Site], batches: list[Tensor]) -> dict[str, list[dict[type, Any]]]:
    stats: dict[str, list[dict[type, Any]]] = {name: [{Gram: Gram(s.in_features)}] for name, s in sites.items()}
    with torch.no_grad(), observe(model, sites, stats):
        for batch in batches:
            model(batch)
    return stats


def run(asked: argparse.Namespace) -> None:
    model, tokenizer = load_model(asked.model, "float32").eval(), load_tokenizer(asked.model)
    source = Source(file=str(asked.text)) if asked.text else Source(exam=True, seed=5)
    batches = calibration_batches(tokenizer, source, num_windows=2 * WINDOWS, window=WINDOW, seed=0)
    sites = {s.name: s for s in find_sites(model) if s.kind == "linear" and s.block in asked.blocks}
    seen, unseen = grams(model, sites, batches[:WINDOWS]), grams(model, sites, batches[WINDOWS:])
    about = {"calibration_tokens": WINDOW * WINDOWS, "text": source.model_dump(exclude_defaults=True)}
    if asked.text:
        about["text"] = {"file": asked.text.name}
    for keep, (name, site) in product(asked.keep, sites.items()):
        for row in measure(site, keep, seen[name][0], unseen[name][0][Gram]):
            full = {"study": "structures", "model": asked.model.name, **row, **about, "measured": now()}
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**full, "environment": environment()}) + "\n")
            print(name, keep, row["structure"], row["numbers"], round(row["output_error"], 3), flush=True)


def summary() -> None:
    """One line per model, budget and structure: mean errors, and how many layers beat low rank of as many numbers."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups[row["model"], row["keep"], row["structure"]].append(row)
    print("| model | keep | structure | layers | kept | error | unseen | low rank of as many | below it | MACs |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (model, keep, structure), rows in groups.items():
        mean = {
            key: sum(row[key] for row in rows) / len(rows)
            for key in ("kept", "output_error", "unseen_output_error", "rival_output_error", "macs_per_token")
        }
        wins = sum(row["output_error"] < row["rival_output_error"] for row in rows)
        print(
            f"| {model} | {keep} | {structure} | {len(rows)} | {mean['kept']:.3f} | {mean['output_error']:.3f} | "
            f"{mean['unseen_output_error']:.3f} | {mean['rival_output_error']:.3f} | {wins} of {len(rows)} | "
            f"{mean['macs_per_token']:,.0f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--text", type=Path, help="of the calibration; without it questions of the exam")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.0625, 0.1875])
    parser.add_argument("--summary", action="store_true", help="print the rows as a table instead")
    asked = parser.parse_args()
    summary() if asked.summary else run(asked)
