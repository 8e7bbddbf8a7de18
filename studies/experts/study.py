"""Is the rank of the expert mode what binds? All ways to share what experts have, at equal numbers, on a trained model.

    python studies/experts/study.py --model build/experts --data ../shared/data

The model is the one of train.py. Every row replaces the experts of all blocks; gate_up and down keep the same share of
their numbers. `Tucker, A of 8` gives the experts A cores to mix, and what that saves to the other two ranks.
Perplexity is that of 64,000 tokens of WikiText-2 test (in_domain) and 38,000 of unread documents of C4 (held_out).
Rows are appended to results.jsonl; one that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensormix
from tensormix.plan import Plan
from tensormix.storage.files import environment, now

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "quality"))

from text import parts  # noqa: E402
from train_midsize import pack, perplexity  # noqa: E402

EXPERTS, SHAPES = 8, {"gate_up": (256, 192), "down": (192, 128)}
KEEPS = (0.75, 0.5, 0.25)
CALIBRATION, WINDOW = 64, 256
JUDGED = {"in_domain": 250, "held_out": 150}  # windows


def equal_ranks(num_cores: int, shape: tuple[int, int], keep: float) -> tuple[int, int, int]:
    """Ranks of experts, outputs and inputs within the budget, the last two the same share of their modes."""
    (O, I), budget, share = shape, keep * EXPERTS * shape[0] * shape[1], 0.0
    while share < 1:
        R, S = int((share + 1e-3) * O), int((share + 1e-3) * I)
        if num_cores * R * S + O * R + I * S + EXPERTS * num_cores > budget:
            break
        share += 1e-3
    return num_cores, max(1, int(share * O)), max(1, int(share * I))


def variants(keep: float) -> dict[str, list[dict[str, Any]]]:
    def both(**method: Any) -> list[dict[str, Any]]:
        return [{"sites": list(SHAPES), "method": method}]

    found = {
        "svd of each expert": both(name="svd", keep=keep),
        "svd_llm of each expert": both(name="svd_llm", keep=keep),
        "td_moe, preserve": both(name="td_moe", keep=keep),
        "td_moe, compress": both(name="td_moe", keep=keep, experts="compress"),
        "td_moe as released, preserve": both(
            name="td_moe", keep=keep, whiten=False, routing=False, steps=0, rank_rule="published"
        ),
        "td_moe as released, compress": both(
            name="td_moe", keep=keep, experts="compress", whiten=False, routing=False, steps=0, rank_rule="published"
        ),
        "mobe of 2 bases": both(name="mobe", keep=keep, num_bases=2),
        "mobe of 4 bases": both(name="mobe", keep=keep, num_bases=4),
        "mobe of 4 bases, silu": both(name="mobe", keep=keep, num_bases=4, activation="silu"),
        "zero": both(name="zero"),
    }
    for cores in (2, 4, 6, 8):
        found[f"Tucker, {cores} of {EXPERTS}"] = [
            {"sites": [role], "method": {"name": "td_moe", "experts": "preserve" if cores == EXPERTS else "compress",
                                         "ranks": equal_ranks(cores, shape, keep)}}
            for role, shape in SHAPES.items()
        ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what train.py wrote")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    texts, tokenizer = parts(options.data), AutoTokenizer.from_pretrained(options.model)
    streams = {name: pack(tokenizer, texts[name]) for name in JUDGED}
    seen = pack(tokenizer, texts["recovery"])
    starts = torch.randint(len(seen) - WINDOW, (CALIBRATION,), generator=torch.Generator().manual_seed(0))
    batches = [seen[start : start + WINDOW][None] for start in starts.tolist()]
    file = HERE / "results.jsonl"
    there = {(row["variant"], row["keep"]) for row in map(json.loads, file.read_text().splitlines())} if (
        file.exists()
    ) else set()  # fmt: skip
    wanted = [("dense", 1.0, []), *((n, keep, r) for keep in KEEPS for n, r in variants(keep).items())]
    for name, keep, rules in wanted:
        if (name, keep) in there:
            continue
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        began = time.perf_counter()
        rows = tensormix.compress(model, Plan.of(rules), batches) if rules else []
        row: dict[str, Any] = {"variant": name, "keep": keep, "rules": rules}
        row |= {
            "numbers": sum(r["parameters"] for r in rows),
            "dense_numbers": sum(r["dense_parameters"] for r in rows),
        }
        row |= {"seconds": round(time.perf_counter() - began, 1)}
        row |= {part: perplexity(model, streams[part], windows) for part, windows in JUDGED.items()}
        print({key: row[key] for key in ("variant", "keep", "numbers", "in_domain", "held_out", "seconds")}, flush=True)
        with file.open("a") as lines:
            lines.write(json.dumps({**row, "environment": environment(), "finished": now()}) + "\n")


if __name__ == "__main__":
    main()
