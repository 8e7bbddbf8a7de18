"""How fast the structured layers are, beside the dense layer of the same shape, in one run on one machine.

    python benchmarks/speed.py                     # every part; or --parts llama model bfloat16 qwen
    python benchmarks/performance_page.py          # makes docs/performance.md of the rows

The contestants of a case take turns of 5 ms or one call, so that all see the same machine: `dense` is F.linear,
`low rank` has as many parameters as `mixt` (N_T = 4, d = 2, padding "multiple"), `int8 dynamic` is torch's own layer
(fbgemm): int8 weights, inputs quantised at each call. With `cold` weights each call takes the next of so many copies
that the last cache cannot hold them, as in a model; with `warm` weights the same every time. The roofline of a row is
the larger of its multiply-accumulates over the best matrix product and its bytes over the best reading speed, both
measured in this run. `others_cpu` says how many cores other processes used meanwhile.
Rows go to benchmarks/results/speed.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tensormix.operators import LowRank, MixT
from tensormix.operators.base import StructuredLinear
from tensormix.storage.files import environment

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
SHAPES = {  # (in_features, out_features), each once
    "llama": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "qwen": [(4096, 1024), (4096, 12288), (12288, 4096)],  # q and o are 4096x4096 as in LLaMA
}
MODELS = {"llama": "LLaMA-2-7B", "qwen": "Qwen3-8B", "bfloat16": "LLaMA-2-7B"}
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TOKENS = (1, 8, 128, 1024, 4096)
COLD_TOKENS = 8  # up to which the weights are also taken cold
COLD_BYTES = 640 * 2**20  # of one contestant: more than the last cache of the machines we measured on
SECONDS = 1.0  # of taking turns in one case, after which no new round begins
MIN_ROUNDS, MAX_ROUNDS = 3, 40
TURN = 0.005  # seconds for which a contestant is called again and again: what is measured is the layer, not its start

Call = Callable[[], Any]
Row = dict[str, Any]


class OthersCPU:
    """How many cores other processes keep busy between entering and leaving."""

    def __enter__(self) -> OthersCPU:
        self.start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        wall, others = (b - a for a, b in zip(self.start, self._read(), strict=True))
        self.cores = max(0.0, others / wall)

    @staticmethod
    def _read() -> tuple[float, float]:
        with open("/proc/stat") as lines:
            fields = [int(field) for field in lines.readline().split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy - own.user - own.system


def take_turns(calls: dict[str, Call], seconds: float = SECONDS) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of each call of each contestant, and the cores that others used meanwhile."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    with OthersCPU() as others:
        began = time.perf_counter()
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() - began > seconds:
                break
            for name, call in calls.items():
                turn = time.perf_counter() + TURN
                while True:
                    start = time.perf_counter()
                    call()
                    times[name].append(1000 * (time.perf_counter() - start))
                    if time.perf_counter() > turn:
                        break
    return times, others.cores


def machine(dtype: torch.dtype) -> Row:
    """The best matrix product in GMAC/s and the best reading speed in GB/s, for the roofline."""
    a, b = torch.randn(2, 2048, 2048).to(dtype).unbind()
    large = torch.zeros(2**28)  # 1 GiB
    times, others = take_turns({"product": lambda: a @ b, "reading": large.sum}, seconds=3)
    return {
        "kind": "machine",
        "dtype": str(dtype).removeprefix("torch."),
        "gmacs_per_second": 2048**3 / min(times["product"]) / 1e6,
        "gbytes_per_second": large.nbytes / min(times["reading"]) / 1e6,
        "others_cpu": others,
    }


def filled(operator: StructuredLinear, dtype: torch.dtype) -> StructuredLinear:
    for parameter in operator.parameters():
        nn.init.normal_(parameter, std=0.02)
    return operator.to(dtype)


def int8_dynamic(weight: Tensor) -> Callable[[Tensor], Tensor]:  # (O, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it will be replaced by torchao some day
        scales, zeros = weight.abs().amax(1) / 127, torch.zeros(len(weight), dtype=torch.long)
        packed = torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8), None
        )
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def layers(I: int, O: int, dtype: torch.dtype, cold: bool) -> dict[str, tuple[Iterator[Any], int, int]]:
    """For each contestant: its next layer for ever, the MACs of a token and the bytes of a layer."""
    mixt = filled(MixT(I, O, num_branches=4), dtype)
    rank = round(mixt.num_params / (I + O))
    size = mixt.core_0.element_size()

    def copies(make: Callable[[], Any], num_bytes: int) -> Iterator[Any]:
        return itertools.cycle([make() for _ in range(-(-COLD_BYTES // num_bytes) if cold else 1)])

    def dense() -> Tensor:
        return torch.randn(O, I, dtype=dtype)

    one = dense()
    found = {
        "dense": (copies(one.clone, one.nbytes), I * O, one.nbytes),
        "mixt": (
            copies(lambda: filled(MixT(I, O, num_branches=4), dtype), size * mixt.num_params),
            mixt.macs_per_token,
            size * mixt.num_params,
        ),
        "low rank": (
            copies(lambda: filled(LowRank(I, O, rank=rank), dtype), size * rank * (I + O)),
            rank * (I + O),
            size * rank * (I + O),
        ),
    }
    if dtype == torch.float32:
        found["int8 dynamic"] = (copies(lambda: int8_dynamic(one), I * O), I * O, I * O)
    return found


def forward_call(name: str, layer: Iterator[Any], x: Tensor) -> Call:
    if name == "dense":
        return lambda: F.linear(x, next(layer))
    return lambda: next(layer)(x)


def training_call(name: str, layer: Iterator[Any], x: Tensor, dy: Tensor) -> Call:
    x = x.clone().requires_grad_()

    def call() -> None:
        one = next(layer)
        parameters = [one.requires_grad_()] if name == "dense" else list(one.parameters())
        y = F.linear(x, one) if name == "dense" else one(x)
        torch.autograd.grad(y, [x, *parameters], dy)

    return call


def shares(call: Call) -> dict[str, float]:
    """Of the time of a call, the share of each of PyTorch's own operations, and of what lies between them."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        call()
        wall = 1e6 * (time.perf_counter() - start)
    spent = {event.key: event.self_cpu_time_total / wall for event in trace.key_averages()}
    return {name: round(share, 4) for name, share in spent.items() if share >= 0.01}


def layer_rows(part: str, dtype: torch.dtype, best: Row) -> Iterator[Row]:
    for I, O in SHAPES["qwen" if part == "qwen" else "llama"]:
        for cold in (True, False):
            contestants = layers(I, O, dtype, cold)
            for tokens in TOKENS if not cold else [n for n in TOKENS if n <= COLD_TOKENS]:
                x, dy = torch.randn(tokens, I, dtype=dtype), torch.randn(tokens, O, dtype=dtype)
                case = {"kind": "layer", "model": MODELS[part], "in_features": I, "out_features": O, "tokens": tokens}
                case |= {"dtype": best["dtype"], "weights": "cold" if cold else "warm"}
                with torch.no_grad():
                    calls = {name: forward_call(name, layer, x) for name, (layer, _, _) in contestants.items()}
                    yield from measured({**case, "pass": "forward"}, calls, contestants, (tokens, 1, I + O), best)
                if cold or (part == "bfloat16" and tokens > 1024):
                    continue
                calls = {
                    name: training_call(name, layer, x, dy)
                    for name, (layer, _, _) in contestants.items()
                    if name != "int8 dynamic"
                }
                work = (tokens, 3, I + O)
                yield from measured({**case, "pass": "forward and backward"}, calls, contestants, work, best)


def measured(
    case: Row, calls: dict[str, Call], contestants: dict[str, Any], work: tuple[int, int, int], best: Row
) -> Iterator[Row]:
    """One row for each contestant of a case; `work` is tokens, products and features read and written for each."""
    tokens, products, features = work
    times, others = take_turns(calls)
    dense = statistics.median(times["dense"])
    for name, values in times.items():
        _, macs, num_bytes = contestants[name]
        moved = products * (num_bytes + getattr(torch, best["dtype"]).itemsize * tokens * features)
        floor = 1000 * max(products * tokens * macs / best["gmacs_per_second"], moved / best["gbytes_per_second"]) / 1e9
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {**case, "layer": name, "median_ms": median, "low_ms": low, "high_ms": high, "calls": len(values)}
        row |= {"speedup": dense / median, "of_roofline": floor / median, "others_cpu": others}
        if name == "mixt":
            row["shares"] = shares(calls[name])
        yield row


def model_rows(num_blocks: int, num_compressed: int) -> Iterator[Row]:
    """Prefill and decode of blocks of LLaMA-2-7B, dense and with the last ones as MixT; the others are shared."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tensormix.sites import find_sites, install

    config = LlamaConfig(**LLAMA, num_hidden_layers=num_blocks, tie_word_embeddings=True)
    with torch.no_grad(), torch.random.fork_rng():
        dense = LlamaForCausalLM(config).eval()
        with torch.device("meta"):
            small = LlamaForCausalLM(config)
        small = small.eval()
        for name, module in dense.named_modules():  # the same tensors, not copies
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                setattr(small.get_submodule(name), key, tensor)
        for site in find_sites(small):
            last = site.block is not None and site.block >= num_blocks - num_compressed
            if last and isinstance(site.module, nn.Linear):
                I, O = site.module.in_features, site.module.out_features
                install(small, site.name, filled(MixT(I, O, num_branches=4), torch.float32))
        yield from _model_times({"dense": dense, "mixt": small}, num_blocks, num_compressed)


def _model_times(models: dict[str, Any], num_blocks: int, num_compressed: int) -> Iterator[Row]:
    case = {"kind": "model", "model": "LLaMA-2-7B", "blocks": num_blocks, "compressed": num_compressed}
    case |= {"dtype": "float32", "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}}
    for stage, tokens in (("prefill", 128), ("prefill", 512), ("decode", 1)):
        ids = torch.randint(LLAMA["vocab_size"], (1, 128 if stage == "decode" else tokens))
        calls: dict[str, Call] = {}
        for name, model in models.items():
            if stage == "decode":
                cache = model(input_ids=ids, use_cache=True).past_key_values
                calls[name] = lambda m=model, c=cache, i=ids: m(input_ids=i[:, :1], past_key_values=c, use_cache=True)
            else:
                calls[name] = lambda m=model, i=ids: m(input_ids=i, use_cache=False, logits_to_keep=1)
        times, others = take_turns(calls, seconds=8)
        dense = statistics.median(times["dense"])
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            row = {**case, "pass": stage, "tokens": tokens, "layer": name, "median_ms": median, "low_ms": low}
            yield row | {"high_ms": high, "calls": len(values), "speedup": dense / median, "others_cpu": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["llama", "model", "bfloat16", "qwen"])
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the whole model")
    parser.add_argument("--compressed", type=int, default=2, help="of these, the last so many as MixT")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    stamp = {"benchmark": "speed", "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    with options.out.open("a", encoding="utf-8") as out:
        for part in options.parts:
            best = machine(torch.bfloat16 if part == "bfloat16" else torch.float32)
            model = part == "model"
            rows = (
                model_rows(options.blocks, options.compressed)
                if model
                else layer_rows(part, getattr(torch, best["dtype"]), best)
            )
            for row in itertools.chain([best], rows):
                out.write(json.dumps({**stamp, "part": part, **row, "environment": environment()}) + "\n")
                out.flush()
                print({key: row[key] for key in row if key not in ("kind", "shares", "parameters")}, flush=True)


if __name__ == "__main__":
    main()
