"""Time of fitting MixT to the calibration inputs of a large layer.

    OMP_NUM_THREADS=2 python benchmarks/mixt_aware.py
    python benchmarks/mixt_aware.py --layers 512x1024 --out rows.jsonl

The weight is random, since the time depends on it only through the number of steps; the inputs fill a quarter of the
directions with scales that fall by 1e3, in no particular basis, and the rest with noise. What is timed is the whole
fit from the weight and the Gram matrix; one row per layer is appended to benchmarks/results/mixt_aware.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from tensormix.methods import Mixt
from tensormix.statistics import Gram
from tensormix.storage.files import environment, now

RESULTS = Path(__file__).parent / "results" / "mixt_aware.jsonl"


def gram(in_features: int, generator: torch.Generator) -> Gram:
    statistic, rank = Gram(in_features, dtype=torch.float32), in_features // 4
    mixing = torch.randn(rank, in_features, generator=generator) * torch.logspace(0, -3, rank)[:, None]
    for _ in range(4):
        tokens = torch.randn(in_features // 2, rank, generator=generator) @ mixing
        statistic.update(tokens + 1e-3 * torch.randn(tokens.shape, generator=generator))
    return statistic


def measure(out_features: int, in_features: int, method: Mixt) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    weight: Tensor = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    stats = {Gram: gram(in_features, generator)}
    start = time.perf_counter()
    operator, facts = method.fit_with_facts(weight, stats)
    seconds = round(time.perf_counter() - start, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "benchmark": "mixt_aware",
        "out_features": out_features,
        "in_features": in_features,
        "method": method.model_dump(),
        "parameters": operator.num_params,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "peak_rss_bytes": peak,
        **facts,
        "measured": now(),
        "environment": environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["4096x11008", "11008x4096"], help="OUTxIN each")
    parser.add_argument("--num-branches", type=int, default=4)
    parser.add_argument("--precision", default="float32", choices=["float32", "float64"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    for layer in asked.layers:
        sizes = [int(size) for size in layer.split("x")]
        row = measure(*sizes, Mixt(num_branches=asked.num_branches, init="aware", precision=asked.precision))
        print({key: value for key, value in row.items() if key != "environment"}, flush=True)
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
