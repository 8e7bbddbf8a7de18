"""Layers that read the same input, as one product and one by one; compressed experts grouped and one by one.

    python benchmarks/fused.py                     # every part; or --parts siblings memory model experts
    python benchmarks/fused_page.py                # makes docs/siblings.md of the rows

Contestants take turns and weights are cold or warm as in speed.py. `dense` is F.linear for each layer; `separate` and
`together` are MixT (N_T = 4, d = 2, padding "multiple"), the latter as `tensormix.fuse_siblings` runs it; `low rank`
has as many parameters, and `low rank together` multiplies the right factors of all layers as one matrix.
Rows go to benchmarks/results/fused.jsonl. A case that other processes disturbed has none: run `--missing` for those.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import COLD_BYTES, filled
from fused_experts import expert_rows
from fused_memory import memory_rows
from speed import LLAMA, Call, Row, machine, quietest
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.inference.siblings import fuse_siblings
from tensormix.operators import MixT, Siblings
from tensormix.storage.files import environment

RESULTS = Path(__file__).parent / "results" / "fused.jsonl"
GROUPS = {  # model, layers -> in_features, the out_features of each
    ("LLaMA-2-7B", "q, k, v"): (4096, (4096, 4096, 4096)),
    ("LLaMA-2-7B", "gate, up"): (4096, (11008, 11008)),
    ("Qwen3-8B", "q, k, v"): (4096, (4096, 1024, 1024)),
    ("Qwen3-8B", "k, v"): (4096, (1024, 1024)),
}
TOKENS = {"cold": (1, 8), "warm": (1, 8, 128, 1024)}
SECONDS = 0.5  # of taking turns in one case
OTHERS = 0.25  # of a core that other processes may use while a case is measured
DONE: set[str] = set()  # cases that need not be measured again
CASE = {  # the keys of a case, by its kind
    "siblings": ("kind", "model", "layers", "in_features", "out_features", "tokens", "weights", "pass"),
    "model": ("kind", "model", "blocks", "pass", "tokens"),
    "experts": ("kind", "experts", "visited", "tokens", "hidden", "intermediate", "keep"),
}
QWEN = {**LLAMA, "intermediate_size": 12288, "num_key_value_heads": 8, "head_dim": 128}


def quartiles(case: Row, calls: dict[str, Call], against: str, seconds: float = SECONDS) -> Iterator[Row]:
    """One row for each contestant; `speedup` is over `against`. None if the case is done, or was disturbed."""
    if str(case) in DONE:
        return
    times, others = quietest(calls, seconds)
    if others > OTHERS:
        print(f"disturbed by {others:.2f} of a core: {case}", flush=True)
        return
    base = statistics.median(times[against])
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {**case, "layer": name, "median_ms": median, "low_ms": low, "high_ms": high, "calls": len(values)}
        yield row | {"speedup": base / median, "others_cpu": others}


def number(*shape: int) -> nn.Parameter:
    """The same number everywhere: its value is not the matter, and hundreds of megabytes are filled at once."""
    return nn.Parameter(torch.full(shape, 0.01))


class Contestants:
    """Copies of the layers of one group, so many that calls in turn find them in memory (cold) or in the cache."""

    def __init__(self, I: int, out_features: tuple[int, ...], cold: bool) -> None:
        self.I, self.out_features = I, out_features
        self.ranks = [round(MixT(I, O, num_branches=4).num_params / (I + O)) for O in out_features]
        dense_bytes = 4 * I * sum(out_features)
        small = -(-COLD_BYTES // (dense_bytes // 16)) if cold else 1
        self.dense = self._endless(self._dense, -(-COLD_BYTES // dense_bytes) if cold else 1)
        self.separate = self._endless(self._mixt, small)
        self.together = self._endless(self._siblings, small)
        self.low_rank = self._endless(self._low_rank, small)

    @staticmethod
    def _endless(make: Callable[[], Any], copies: int) -> Iterator[Any]:
        return itertools.cycle([make() for _ in range(copies)])

    def _dense(self) -> list[nn.Parameter]:
        return [number(O, self.I) for O in self.out_features]

    def _mixt(self) -> list[Any]:
        layers = [MixT(self.I, O, num_branches=4) for O in self.out_features]
        for parameter in itertools.chain(*(layer.parameters() for layer in layers)):
            nn.init.constant_(parameter, 0.01)
        return layers

    def _siblings(self) -> Siblings:
        layers = self._mixt()
        return Siblings(names=[str(number) for number in range(len(layers))], parts=layers)

    def _low_rank(self) -> tuple[nn.Parameter, list[nn.Parameter]]:
        """The right factors in one matrix, of which those of each layer are rows, and the left ones."""
        left = [number(O, rank) for O, rank in zip(self.out_features, self.ranks, strict=True)]
        return number(sum(self.ranks), self.I), left

    def calls(self, x: Tensor) -> dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]]:
        """For each contestant, what gives its outputs and its parameters."""

        def dense() -> tuple[list[Tensor], list[Tensor]]:
            weights = next(self.dense)
            return [F.linear(x, weight) for weight in weights], weights

        def separate() -> tuple[list[Tensor], list[Tensor]]:
            layers = next(self.separate)
            return [layer.multiply(x) for layer in layers], [core for layer in layers for core in layer.cores]

        def together() -> tuple[list[Tensor], list[Tensor]]:
            layers = next(self.together)
            return list(layers(x).values()), layers.cores

        def low_rank() -> tuple[list[Tensor], list[Tensor]]:
            right, left = next(self.low_rank)
            rows = right.split(self.ranks)
            return [F.linear(F.linear(x, r), l) for r, l in zip(rows, left, strict=True)], [right, *left]

        def low_rank_together() -> tuple[list[Tensor], list[Tensor]]:
            right, left = next(self.low_rank)
            hidden = F.linear(x, right).split(self.ranks, -1)
            return [F.linear(h, l) for h, l in zip(hidden, left, strict=True)], [right, *left]

        return {
            "dense": dense,
            "separate": separate,
            "together": together,
            "low rank": low_rank,
            "low rank together": low_rank_together,
        }


def trained(call: Callable[[], tuple[list[Tensor], list[Tensor]]], x: Tensor) -> Call:
    def step() -> None:
        outputs, parameters = call()
        torch.autograd.grad(outputs, [x, *parameters], [torch.ones_like(y) for y in outputs])

    return step


def passes(case: Row) -> list[str]:
    trained = case["tokens"] == 1024 and case["layers"] == "q, k, v"
    return ["forward", "forward and backward"] if trained else ["forward"]


def sibling_rows() -> Iterator[Row]:
    for (model, names), (I, out_features) in GROUPS.items():
        for weights, counts in TOKENS.items():
            group: Row = {"kind": "siblings", "model": model, "layers": names, "in_features": I}
            group["out_features"] = list(out_features)
            rest = [{**group, "tokens": tokens, "weights": weights} for tokens in counts]
            rest = [case for case in rest if not {str({**case, "pass": kind}) for kind in passes(case)} <= DONE]
            contestants = Contestants(I, out_features, weights == "cold") if rest else None
            for case in rest:
                assert contestants is not None
                x = torch.randn(case["tokens"], I)
                with torch.no_grad():
                    yield from quartiles({**case, "pass": "forward"}, {**contestants.calls(x)}, "dense")
                if len(passes(case)) > 1:
                    calls = contestants.calls(x.requires_grad_())
                    steps = {name: trained(call, x) for name, call in calls.items() if not name.startswith("low")}
                    yield from quartiles({**case, "pass": "forward and backward"}, steps, "dense")


def empty_model(settings: dict[str, Any], num_blocks: int, qwen: bool) -> Any:
    """Blocks of these widths, all linear layers MixT, random; a small vocabulary: the head is not the matter."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from tensormix.sites import find_sites, install

    config_type, model_type = (Qwen3Config, Qwen3ForCausalLM) if qwen else (LlamaConfig, LlamaForCausalLM)
    config: Any = config_type(**{**settings, "vocab_size": 1000}, num_hidden_layers=num_blocks)
    with torch.device("meta"):
        model = model_type(config)
    for site in find_sites(model):
        if isinstance(site.module, nn.Linear):
            operator = MixT(site.in_features, site.out_features, num_branches=4)
            install(model, site.name, filled(operator, torch.float32))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.full(parameter.shape, 0.02)))
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    return model.eval()


@torch.no_grad()
def model_rows(num_blocks: int = 8) -> Iterator[Row]:
    """Decoding one token after 64, and reading 64, with all layers MixT."""
    for name, settings in (("LLaMA-2-7B", LLAMA), ("Qwen3-8B", QWEN)):
        model = empty_model(settings, num_blocks, name == "Qwen3-8B")
        ids = torch.randint(1000, (1, 64))
        case = {"kind": "model", "model": name, "blocks": num_blocks}
        for stage, tokens in (("decode", 1), ("prefill", 64)):
            caches = {}

            def call(key: str, ids: Tensor = ids, stage: str = stage, caches: dict = caches, model: Any = model) -> Any:
                if stage == "prefill":
                    return model(input_ids=ids, use_cache=False, logits_to_keep=1)
                if key not in caches:
                    caches[key] = model(input_ids=ids, use_cache=True).past_key_values
                return model(input_ids=ids[:, :1], past_key_values=caches[key], use_cache=True)

            forms = {"separate": None, "together": {}, "the faster ones together": {"num_tokens": tokens}}
            yield from in_turns({**case, "pass": stage, "tokens": tokens}, model, forms, call)


def in_turns(case: Row, model: Any, forms: dict[str, Any], call: Callable[[str], Any]) -> Iterator[Row]:
    """The same model in several forms, five times each in turns."""
    if str(case) in DONE:
        return
    times: dict[str, list[float]] = {name: [] for name in forms}
    counts: dict[str, int] = {}
    used = 0.0
    for _ in range(5):
        for name, options in forms.items():
            if options is None:
                found, others = quietest({name: lambda n=name: call(n)}, seconds=0.3)
            else:
                with fuse_siblings(model, **options) as rows:
                    counts[name] = sum(row["chosen"] == "together" for row in rows)
                    found, others = quietest({name: lambda n=name: call(n)}, seconds=0.3)
            times[name] += found[name]
            used = max(used, others)
    if used > OTHERS:
        print(f"disturbed by {used:.2f} of a core: {case}", flush=True)
        return
    base = statistics.median(times["separate"])
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {**case, "layer": name, "median_ms": median, "low_ms": low, "high_ms": high, "calls": len(values)}
        yield row | {"groups": counts.get(name, 0), "speedup": base / median, "others_cpu": used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["siblings", "memory", "model", "experts"])
    parser.add_argument("--missing", action="store_true", help="only cases of which there is no row yet")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    stamp = {"benchmark": "fused", "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    makers = {
        "siblings": sibling_rows,
        "memory": partial(memory_rows, GROUPS),
        "model": model_rows,
        "experts": partial(expert_rows, DONE),
    }
    if options.missing and options.out.exists():
        rows = map(json.loads, options.out.read_text(encoding="utf-8").splitlines())
        DONE.update(str({key: row[key] for key in CASE[row["kind"]]}) for row in rows if row["kind"] in CASE)
    with options.out.open("a", encoding="utf-8") as out:
        for part in options.parts:
            best = [machine(torch.float32)] if part == "siblings" else []
            for row in itertools.chain(best, makers[part]()):
                out.write(json.dumps({**stamp, "part": part, **row, "environment": environment()}) + "\n")
                out.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
