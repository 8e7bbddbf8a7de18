"""How fast one block's seven layers are as each structure of equal numbers, beside the dense ones, in one run.

    python benchmarks/structures.py

A block of LLaMA-2-7B in float32, its linear layers and the activation between gate, up and down, one after another:
dense, MixT (N_T = 4), and whitened low rank and `narrow` with as many numbers (random ones: time does not depend on
them), `narrow` also as `tensormix.without_zeros` makes it. They take turns as in speed.py.
Rows go to benchmarks/results/structures.jsonl; studies/quality/page.py makes a table of docs/quality.md from them.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import filled, take_turns
from torch import Tensor, nn
from torch.nn import functional

from tensormix.inference.zeros import without_zeros
from tensormix.methods import Mixt, Narrow, SvdLlm
from tensormix.methods.base import Heads
from tensormix.operators import Dense, StructuredLinear
from tensormix.storage.files import environment

RESULTS = Path(__file__).parent / "results" / "structures.jsonl"
WIDTH, NEURONS, HEADS = 4096, 11008, Heads(32, 32, 128)
SHAPES = {  # (O, I)
    **dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)),
    **dict.fromkeys(("gate", "up"), (NEURONS, WIDTH)),
    "down": (WIDTH, NEURONS),
}
TOKENS = (1, 8, 128, 1024)
KEEP = 0.0625  # what MixT stores at N_T = 4


def contestants() -> dict[str, dict[str, StructuredLinear]]:
    return {
        "dense": {role: Dense(I, O) for role, (O, I) in SHAPES.items()},
        "mixt": {role: Mixt(num_branches=4).empty(I, O) for role, (O, I) in SHAPES.items()},
        "low rank": {role: SvdLlm(keep=KEEP).empty(I, O) for role, (O, I) in SHAPES.items()},
        "narrow": Narrow(keep=KEEP).empty(SHAPES, HEADS),
        "narrow, without zeros": Narrow(keep=KEEP).empty(SHAPES, HEADS),
        "narrow, width 3/4": Narrow(keep=KEEP, width=0.75).empty(SHAPES, HEADS),
    }


class Mlp(nn.Module):
    """gate, up and down with names that `without_zeros` knows."""

    def __init__(self, layers: dict[str, StructuredLinear]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layers["gate"], layers["up"], layers["down"]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
def run(attention: list[StructuredLinear], mlp: Mlp, x: Tensor) -> None:
    for layer in attention:
        layer.multiply(x)
    mlp(x)


def main() -> None:
    block = {
        name: {role: filled(layer.to_empty(device="cpu"), torch.float32) for role, layer in layers.items()}
        for name, layers in contestants().items()
    }
    attention = {name: [layers[role] for role in ("q", "k", "v", "o")] for name, layers in block.items()}
    mlps = {name: nn.ModuleDict({"mlp": Mlp(layers)}) for name, layers in block.items()}
    with without_zeros(mlps["narrow, without zeros"]):
        measure(block, attention, {name: mlp["mlp"] for name, mlp in mlps.items()})


def measure(block: dict[str, dict[str, StructuredLinear]], attention: dict[str, Any], mlps: dict[str, Any]) -> None:
    about = environment()
    for tokens in TOKENS:
        x = torch.randn(tokens, WIDTH)
        calls = {name: partial(run, attention[name], mlps[name], x) for name in block}
        times, others = take_turns(calls, seconds=8)
        dense = statistics.median(times["dense"])
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            row: dict[str, Any] = {"structure": name, "tokens": tokens, "median_ms": median, "low_ms": low}
            row |= {"high_ms": high, "calls": len(values), "speedup": dense / median, "others_cpu": others}
            row["numbers"] = sum(layer.num_params for layer in block[name].values())
            row["macs_per_token"] = sum(layer.macs_per_token for layer in block[name].values())
            print({key: row[key] for key in ("structure", "tokens", "median_ms", "speedup")}, flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row | {"environment": about}) + "\n")


if __name__ == "__main__":
    main()
