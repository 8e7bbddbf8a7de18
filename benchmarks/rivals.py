"""How fast one layer is as each tensor format, beside dense and beside low rank of as many numbers, in one run.

    python benchmarks/rivals.py

Layers of SmolLM2-135M and one of 2048 x 2048 in float32, at a quarter of the numbers, filled at random: time does not
depend on them. All of one shape and number of tokens take turns as in speed.py. `per_head_tt` is measured as q alone.
Rows go to benchmarks/results/rivals.jsonl.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import filled, take_turns

from tensormix.methods import BlastMethod, BttMethod, DenseSparseTt, MonarchMethod, PerHeadTt, Svd, TensorTrainMethod
from tensormix.methods.base import Heads
from tensormix.operators import Dense, StructuredLinear, TensorTrain
from tensormix.storage.files import environment

RESULTS = Path(__file__).parent / "results" / "rivals.jsonl"
SHAPES = {"q": (576, 576), "up": (1536, 576), "down": (576, 1536), "square": (2048, 2048)}  # (O, I)
HEADS = {"q": Heads(9, 9, 64), "square": Heads(32, 32, 64)}
TOKENS = (1, 8, 128, 1024)
KEEP = 0.25


def contestants(layer: str) -> dict[str, StructuredLinear]:
    O, I = SHAPES[layer]
    methods = {
        "low rank": Svd(keep=KEEP),
        "monarch": MonarchMethod(keep=KEEP),
        "btt": BttMethod(keep=KEEP),
        "blast": BlastMethod(keep=KEEP),
        "tensor_train, 12 modes": TensorTrainMethod(keep=KEEP),
        "tensor_train, 4 modes": TensorTrainMethod(keep=KEEP, modes=4),
        "tensor_train, 2 modes": TensorTrainMethod(keep=KEEP, modes=2),
        "tensor_train, 12 modes, rank 8": TensorTrainMethod(rank=8),
        "dense_sparse_tt, 12 modes": DenseSparseTt(keep=KEEP),
    }
    found = {"dense": Dense(I, O), **{name: method.empty(I, O) for name, method in methods.items()}}
    if layer in HEADS:
        found["per_head_tt"] = PerHeadTt(keep=KEEP).empty({"q": (O, I)}, HEADS[layer])["q"]
    made = {name: filled(layer.to_empty(device="cpu"), torch.float32) for name, layer in found.items()}
    for operator in made.values():
        for name, buffer in operator.named_buffers():
            if name.endswith("positions"):  # of sparse entries: those that lie there by chance may be outside
                buffer.zero_()
    return made


@torch.no_grad()
def multiply(layer: StructuredLinear, x: torch.Tensor) -> torch.Tensor:
    return layer.multiply(x)


def main() -> None:
    about = environment()
    for layer, (O, I) in SHAPES.items():
        operators = contestants(layer)
        for tokens in TOKENS:
            x = torch.randn(tokens, I)
            calls = {name: partial(multiply, operator, x) for name, operator in operators.items()}
            times, others = take_turns(calls, seconds=4)
            dense, low_rank = (statistics.median(times[name]) for name in ("dense", "low rank"))
            for name, values in times.items():
                low, median, high = statistics.quantiles(values, n=4, method="inclusive")
                row: dict[str, Any] = {"layer": layer, "shape": [O, I], "structure": name, "tokens": tokens}
                row |= {"median_ms": median, "low_ms": low, "high_ms": high, "calls": len(values)}
                row |= {"over_dense": dense / median, "over_low_rank": low_rank / median, "others_cpu": others}
                operator = operators[name]
                row |= {"numbers": operator.num_params, "macs_per_token": operator.macs_per_token, "keep": KEEP}
                if isinstance(operator, TensorTrain):
                    row |= {"dense_from": operator.dense_from, "largest_rank": max(operator.ranks)}
                print(
                    {key: row[key] for key in ("layer", "structure", "tokens", "median_ms", "over_dense")}, flush=True
                )
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row | {"environment": about}) + "\n")


if __name__ == "__main__":
    main()
