"""The experts of a block in grouped products and one at a time, in the same run.

    python benchmarks/grouped_experts.py           # appends rows to results/grouped_experts.jsonl

Each contestant computes the whole block of experts, routed at random, in turns, in CPU time of one thread. Both ways
are forced; `chosen` is the one that `Experts` takes. `modules` are low-rank experts as modules, one by one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from fused_experts import Gate, Row, in_cpu_time
from torch import nn

from tensormix.operators import BasisExperts, DenseStack, Experts, LowRankStack, StackedLinear, TuckerStack
from tensormix.storage.files import environment

RESULTS = Path(__file__).parent / "results" / "grouped_experts.jsonl"
SHAPES = {  # experts, of which a token visits; the widths of block and expert
    "Qwen3-30B-A3B, half": (64, 8, 1024, 384),
    "Mixtral-8x7B, a quarter": (8, 2, 1024, 3584),
}
TOKENS = (1, 16, 256)


def low_rank(E: int, I: int, O: int) -> StackedLinear:
    """A quarter of the numbers; the rank is odd."""
    return LowRankStack(E, I, O, rank=round(0.25 * I * O / (I + O)) // 2 * 2 + 1)


def tucker(E: int, I: int, O: int) -> StackedLinear:
    return TuckerStack(E, I, O, ranks=(E, O // 2, I // 2))


def tucker_mixed(E: int, I: int, O: int) -> StackedLinear:
    return TuckerStack(E, I, O, ranks=(E // 2, O // 2, I // 2))


def bases(E: int, I: int, O: int) -> StackedLinear:
    return BasisExperts(E, I, O, num_bases=max(2, E // 8), rank=min(I, O) // 2, mirrored=O > I, activation="silu")


STACKS: dict[str, Callable[[int, int, int], StackedLinear]] = {
    "dense": DenseStack,
    "low rank": low_rank,
    "Tucker": tucker,
    "Tucker, mixed cores": tucker_mixed,
    "shared bases": bases,
}


def experts_of(kind: str, shape: str, dtype: torch.dtype) -> Experts:
    E, K, D, H = SHAPES[shape]
    with torch.device("meta"):
        stacks = {"gate_up": STACKS[kind](E, D, 2 * H), "down": STACKS[kind](E, H, D)}
    made = Experts(Gate(), stacks, K).to_empty(device="cpu").to(dtype)  # pyright: ignore[reportArgumentType]
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made


def way(experts: Experts, grouped: bool, inputs: tuple[Any, ...], backward: bool) -> Callable[[], Any]:
    def call() -> Any:
        experts._is_grouped = lambda *_: grouped  # pyright: ignore[reportAttributeAccessIssue]
        try:
            with torch.set_grad_enabled(backward):
                out = experts(*inputs)
            if backward:
                experts.zero_grad()
                out.backward(out.detach())
            return out.detach()
        finally:
            del experts._is_grouped

    return call


def rows_of(shape: str, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    experts = experts_of(kind, shape, dtype)
    E, K, D, _ = SHAPES[shape]
    alone = {name: stack.one_by_one() for name, stack in experts.stacks.items() if isinstance(stack, LowRankStack)}
    apart = Experts(experts.shell, alone or experts.stacks, K)
    for tokens, backward in [*((tokens, False) for tokens in TOKENS), (TOKENS[-1], True)]:
        weights, index = torch.randn(tokens, E).softmax(-1).topk(K)
        inputs = torch.randn(tokens, D, dtype=dtype), index, weights.to(dtype)
        calls = {name: way(experts, name == "grouped", inputs, backward) for name in ("one by one", "grouped")}
        if kind == "low rank":
            calls["modules"] = way(apart, False, inputs, backward)
        slow, fast, *_ = (call() for call in calls.values())
        torch.testing.assert_close(fast, slow, rtol=0, atol=64 * torch.finfo(dtype).eps * float(slow.abs().max()))
        with torch.set_grad_enabled(backward):
            chosen = "grouped" if experts._is_grouped(inputs[0], tokens * K) else "one by one"
        case = {"kind": kind, "shape": shape, "experts": E, "visited": K, "dtype": str(dtype)[6:], "tokens": tokens,
                "pass": "forward and backward" if backward else "forward", "chosen": chosen}  # fmt: skip
        yield from in_cpu_time(case, calls, "one by one", rounds=3 if backward else 7)


def ratios() -> list[list[str]]:
    """Of the newest row of every case: shape, dtype, stack, and how many times as fast grouped is, by tokens and pass.

    In brackets what `Experts` runs one at a time; behind a slash over low-rank experts as modules.
    """
    cases: dict[tuple[str, ...], dict[tuple[int, str], dict[str, Row]]] = {}
    for row in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        of_stack = cases.setdefault((row["shape"], row["dtype"], row["kind"]), {})
        of_stack.setdefault((row["tokens"], row["pass"]), {})[row["layer"]] = row
    body = []
    for names, calls in cases.items():
        cells = []
        for ways in calls.values():
            grouped, *others = (
                ways[name]["median_ms"] for name in ("grouped", "one by one", "modules") if name in ways
            )
            cell = " / ".join(f"{other / grouped:.2f}" for other in others)
            cells.append(cell if ways["grouped"]["chosen"] == "grouped" else f"({cell})")
        body.append([*names, *cells])
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=STACKS, default=list(STACKS))
    kinds = parser.parse_args().kinds
    torch.manual_seed(0)
    about = {"benchmark": "grouped_experts", "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    with RESULTS.open("a", encoding="utf-8") as file:
        for shape in SHAPES:
            for kind in kinds:
                for dtype in (torch.float32, torch.bfloat16):
                    for row in rows_of(shape, kind, dtype):
                        file.write(json.dumps({**about, **row, "environment": environment()}) + "\n")
                        file.flush()
                        print(shape, kind, row["dtype"], row["tokens"], row["pass"], row["layer"], row["chosen"],
                              f"{row['median_ms']:.3f} ms, {row['speedup']:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
