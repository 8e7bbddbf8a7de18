"""How fast the structured layers are, beside the dense layer of the same shape, in one run on one machine.

    python benchmarks/speed.py                     # every part; or --parts llama bfloat16 --shapes 4096x4096
    python benchmarks/performance_page.py          # makes docs/performance.md of the rows

The contestants of a case (contestants.py) take turns of 5 ms or one call, so that all see the same machine. With `cold`
weights each call takes the next of so many copies that the last cache cannot hold them, as in a model; with `warm`
weights the same every time. The roofline of a row is the larger of its multiply-accumulates over the best matrix
product and its bytes over the best reading speed, both measured in this run. `others_cpu` says how many cores other
processes used meanwhile. Rows go to benchmarks/results/speed.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, contestants, filled
from gauges import Call, OthersCPU, peak_bytes, shares, wait_for_others
from torch import nn

from tensormix.inference.faster import dense_where_faster
from tensormix.operators import MixT
from tensormix.storage.files import environment

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
SHAPES = {  # (in_features, out_features), each once
    "llama": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "qwen": [(4096, 1024), (4096, 12288), (12288, 4096)],  # q and o are 4096x4096 as in LLaMA
}
MODELS = {"llama": "LLaMA-2-7B", "qwen": "Qwen3-8B"}
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TOKENS = (1, 8, 128, 1024, 4096)
COLD_TOKENS = 8  # up to which the weights are also taken cold
COMPILED_TOKENS = (1, 128)
MEMORY_TOKENS = (1024, 4096)
CHOICE_TOKENS = (1, 8, 128, 1024)
SECONDS = 1.0  # of taking turns in one case, after which no new round begins
MIN_ROUNDS, MAX_ROUNDS = 3, 40
OTHERS = 0.15  # of a core that other processes may use while a case is measured
TURN = 0.005  # seconds for which a contestant is called again and again: what is measured is the layer, not its start

Row = dict[str, Any]


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


def quietest(calls: dict[str, Call], seconds: float = SECONDS) -> tuple[dict[str, list[float]], float]:
    """As `take_turns`; again, up to three times in all, while others used more than `OTHERS` of a core."""
    found = [take_turns(calls, seconds)]
    while found[-1][1] > OTHERS and len(found) < 3:
        found.append(take_turns(calls, seconds))
    return min(found, key=lambda turns: turns[1])


def machine(dtype: torch.dtype) -> Row:
    """The best matrix product in GMAC/s and the best reading speed in GB/s, for the roofline."""
    a, b = torch.randn(2, 2048, 2048).to(dtype).unbind()
    large = torch.zeros(2**28)  # 1 GiB
    times, others = quietest({"product": lambda: a @ b, "reading": large.sum}, seconds=3)
    return {
        "kind": "machine",
        "dtype": str(dtype).removeprefix("torch."),
        "gmacs_per_second": 2048**3 / min(times["product"]) / 1e6,
        "gbytes_per_second": large.nbytes / min(times["reading"]) / 1e6,
        "others_cpu": others,
    }


def shapes(part: str) -> list[tuple[int, int]]:
    return SHAPES["qwen" if part == "qwen" else "llama"]


def case_of(part: str, I: int, O: int, tokens: int, dtype: torch.dtype) -> Row:
    case = {"kind": "layer", "model": MODELS.get(part, MODELS["llama"]), "in_features": I, "out_features": O}
    return case | {"tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}


def layer_rows(part: str, dtype: torch.dtype, best: Row) -> Iterator[Row]:
    for I, O in shapes(part):
        for cold in (True, False):
            field = contestants(I, O, dtype, cold=cold, compiled=part == "compiled")
            for tokens in COMPILED_TOKENS if part == "compiled" else TOKENS:
                if cold and tokens > COLD_TOKENS:
                    continue
                x, dy = torch.randn(tokens, I, dtype=dtype), torch.randn(tokens, O, dtype=dtype)
                case = case_of(part, I, O, tokens, dtype) | {"weights": "cold" if cold else "warm"}
                with torch.no_grad():
                    taking = {name: one for name, one in field.items() if tokens <= (one.max_tokens or tokens)}
                    calls = {name: one.call(x) for name, one in taking.items()}
                    yield from measured({**case, "pass": "forward"}, calls, taking, (tokens, 1, I + O), best)
                if cold or part == "compiled" or (part == "bfloat16" and tokens > 1024):
                    continue
                taking = {name: one for name, one in field.items() if one.trains}
                calls = {name: one.training_call(x, dy) for name, one in taking.items()}
                work = (tokens, 3, I + O)
                yield from measured({**case, "pass": "forward and backward"}, calls, taking, work, best)


def measured(
    case: Row, calls: dict[str, Call], taking: dict[str, Contestant], work: tuple[int, int, int], best: Row
) -> Iterator[Row]:
    """One row for each contestant of a case; `work` is tokens, products and features read and written for each."""
    tokens, products, features = work
    times, others = quietest(calls)
    dense = statistics.median(times["dense"])
    for name, values in times.items():
        one = taking[name]
        moved = products * (one.num_bytes + getattr(torch, case["dtype"]).itemsize * tokens * features)
        rates = products * tokens * one.macs / best["gmacs_per_second"], moved / best["gbytes_per_second"]
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {**case, "layer": name, "median_ms": median, "low_ms": low, "high_ms": high, "calls": len(values)}
        row |= {"speedup": dense / median, "of_roofline": max(rates) / 1e6 / median, "others_cpu": others}
        if name == "mixt":
            row["shares"] = shares(calls[name])
        yield row


def memory_rows(part: str, dtype: torch.dtype, _: Row) -> Iterator[Row]:
    """What one call takes beside weights and inputs, gradients included, and what the weights take."""
    for I, O in shapes(part):
        field = contestants(I, O, dtype, cold=False)
        for tokens, name in itertools.product(MEMORY_TOKENS, ("dense", "mixt")):
            x, dy = torch.randn(tokens, I, dtype=dtype), torch.randn(tokens, O, dtype=dtype)
            one, case = field[name], case_of(part, I, O, tokens, dtype)
            calls = {"forward": torch.no_grad()(one.call(x)), "forward and backward": one.training_call(x, dy)}
            for kind, call in calls.items():
                sizes = {"peak_bytes": peak_bytes(call), "weight_bytes": one.num_bytes}
                yield {**case, "kind": "memory", "pass": kind, "layer": name, **sizes, "others_cpu": 0.0}


def choice_rows(part: str, dtype: torch.dtype, _: Row) -> Iterator[Row]:
    """What `tensormix.dense_where_faster` measures and chooses."""
    for (I, O), tokens in itertools.product([*SHAPES["llama"], SHAPES["qwen"][0]], CHOICE_TOKENS):
        model = nn.Sequential(filled(MixT(I, O, num_branches=4), dtype))
        with OthersCPU() as others, dense_where_faster(model, num_tokens=tokens) as rows:
            chosen = {key: rows[0][key] for key in ("structured_ms", "dense_ms", "chosen")}
        case = case_of(part, I, O, tokens, dtype) | {"kind": "choice", "layer": "mixt"}
        yield {**case, **chosen, "others_cpu": others.cores}


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
        times, others = quietest(calls, seconds=8)
        dense = statistics.median(times["dense"])
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            row = {**case, "pass": stage, "tokens": tokens, "layer": name, "median_ms": median, "low_ms": low}
            yield row | {"high_ms": high, "calls": len(values), "speedup": dense / median, "others_cpu": others}


PARTS: dict[str, tuple[torch.dtype, Callable[..., Iterator[Row]]]] = {
    "llama": (torch.float32, layer_rows),
    "bfloat16": (torch.bfloat16, layer_rows),
    "qwen": (torch.float32, layer_rows),
    "compiled": (torch.float32, layer_rows),
    "memory": (torch.float32, memory_rows),
    "choice": (torch.bfloat16, choice_rows),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "model"], choices=[*PARTS, "model"])
    parser.add_argument("--shapes", nargs="+", metavar="IxO", help="of the layers; all of the part if left out")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the whole model")
    parser.add_argument("--compressed", type=int, default=2, help="of these, the last so many as MixT")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.shapes:
        wanted = {tuple(int(size) for size in shape.split("x")) for shape in options.shapes}
        SHAPES.update({part: [shape for shape in known if shape in wanted] for part, known in SHAPES.items()})
    torch.manual_seed(0)
    stamp = {"benchmark": "speed", "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    where = environment()
    where["versions"]["torchao"] = metadata.version("torchao") if find_spec("torchao") else None
    with options.out.open("a", encoding="utf-8") as out:
        for part in options.parts:
            wait_for_others(OTHERS)
            dtype, make_rows = PARTS.get(part, (torch.float32, None))
            best = machine(dtype)
            made = make_rows(part, dtype, best) if make_rows else model_rows(options.blocks, options.compressed)
            for row in itertools.chain([best], made):
                out.write(json.dumps({**stamp, "part": part, **row, "environment": where}) + "\n")
                out.flush()
                print({key: row[key] for key in row if key not in ("kind", "shares", "parameters")}, flush=True)


if __name__ == "__main__":
    main()
