"""Compressed experts one by one and grouped: the part "experts" of fused.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from contestants import filled
from torch import Tensor
from torch.nn import functional as F

from tensormix.operators import Experts, ExpertStack, LowRank, MixT

Row = dict[str, Any]
Call = Callable[[], Any]
EXPERTS = {"hidden": 2048, "intermediate": 1024, "keep": 0.25}  # the widths of OLMoE


class Gate:
    """What transformers' fused experts say about themselves, as far as `Experts` asks."""

    has_gate, has_post_expert_norm = True, False

    @staticmethod
    def named_children() -> list[Any]:
        return []

    @staticmethod
    def _apply_gate(hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up


class GroupedLowRank:
    """The same experts with their factors stacked: tokens sorted by expert, four grouped products."""

    def __init__(self, experts: Experts, padded: bool) -> None:
        self.num_experts, self.padded = experts.num_experts, padded
        self.factors = []
        for stack in experts.stacks.values():
            each: list[Any] = [stack.expert(e) for e in range(self.num_experts)]  # pyright: ignore[reportAttributeAccessIssue]
            self.factors += [torch.stack([getattr(e, side).t() for e in each]) for side in ("right", "left")]

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        choice = index.reshape(-1)
        picks = choice.argsort(stable=True)
        tokens, counts = picks // index.shape[-1], torch.bincount(choice, minlength=self.num_experts)
        x = hidden[tokens]
        y = self._padded(x, choice[picks], counts) if self.padded else self._grouped(x, counts)
        return torch.zeros_like(hidden).index_add_(0, tokens, y * weights.reshape(-1, 1)[picks])

    def _grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        into, out, down_in, down_out = self.factors
        h = Gate._apply_gate(F.grouped_mm(F.grouped_mm(x, into, offs=ends), out, offs=ends))
        return F.grouped_mm(F.grouped_mm(h, down_in, offs=ends), down_out, offs=ends)

    def _padded(self, x: Tensor, choice: Tensor, counts: Tensor) -> Tensor:
        """As many rows for each expert as the busiest has."""
        starts = counts.cumsum(0) - counts
        places = choice * counts.max() + torch.arange(len(x)) - starts[choice]
        into, out, down_in, down_out = self.factors
        rows = x.new_zeros(self.num_experts * int(counts.max()), x.shape[1])
        rows = rows.index_copy_(0, places, x).view(self.num_experts, -1, x.shape[1])
        y = torch.bmm(torch.bmm(Gate._apply_gate(torch.bmm(torch.bmm(rows, into), out)), down_in), down_out)
        return y.flatten(0, 1)[places]


def experts_of(kind: str, num_experts: int, num_visited: int) -> Experts:
    D, H, keep = EXPERTS["hidden"], EXPERTS["intermediate"], EXPERTS["keep"]

    def each(I: int, O: int) -> ExpertStack:  # ranks in steps of 8, because grouped_mm wants strides of 16 bytes
        made = [
            MixT(I, O, num_branches=3) if kind == "mixt" else LowRank(I, O, rank=8 * round(keep * I * O / (I + O) / 8))
            for _ in range(num_experts)
        ]
        return ExpertStack.from_experts([filled(one, torch.float32) for one in made])

    return Experts(Gate(), {"gate_up": each(D, 2 * H), "down": each(H, D)}, num_visited)  # pyright: ignore


@torch.no_grad()
def expert_rows(done: Collection[str]) -> Iterator[Row]:
    """One row for each contestant of every case that is not done."""
    for num_experts, visited in ((8, 2), (64, 8)):
        low_rank, mixt = (experts_of(kind, num_experts, visited) for kind in ("low rank", "mixt"))
        grouped, padded = GroupedLowRank(low_rank, padded=False), GroupedLowRank(low_rank, padded=True)
        for tokens in (1, 128, 1024):
            hidden = torch.randn(tokens, int(EXPERTS["hidden"]))
            weights, index = torch.randn(tokens, num_experts).softmax(-1).topk(visited)
            calls: dict[str, Call] = {
                name: lambda f=form, h=hidden, i=index, w=weights: f(h, i, w)
                for name, form in {
                    "low rank, one by one": low_rank,
                    "low rank, grouped_mm": grouped,
                    **({"low rank, bmm": padded, "mixt, one by one": mixt} if tokens <= 128 else {}),
                }.items()
            }
            wanted = calls["low rank, one by one"]()
            for name in ("low rank, grouped_mm", "low rank, bmm") if tokens == 1 else ():
                torch.testing.assert_close(calls[name](), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
            case = {"kind": "experts", "experts": num_experts, "visited": visited, "tokens": tokens, **EXPERTS}
            if str(case) not in done:
                yield from in_cpu_time(case, calls, "low rank, one by one", rounds=3 if tokens > 128 else 5)


def in_cpu_time(case: Row, calls: dict[str, Call], against: str, rounds: int) -> Iterator[Row]:
    """CPU time of one thread, in turns: other processes lengthen the wall clock, and this one hardly."""
    threads, times = torch.get_num_threads(), {name: [] for name in calls}
    torch.set_num_threads(1)
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(1000 * (time.process_time() - start))
    torch.set_num_threads(threads)
    base = statistics.median(times[against])
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {**case, "layer": name, "median_ms": median, "low_ms": low, "high_ms": high, "calls": len(values)}
        yield row | {"speedup": base / median, "clock": "CPU time, one thread"}
