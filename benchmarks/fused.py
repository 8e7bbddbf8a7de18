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
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contestants import COLD_BYTES, filled
from speed import LLAMA, Call, Row, machine, take_turns
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.inference.siblings import fuse_siblings
from tensormix.kernels.mixt import cpu, siblings
from tensormix.operators import Experts, ExpertStack, LowRank, MixT, Siblings
from tensormix.profile import LiveBytes
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
EXPERTS = {"hidden": 2048, "intermediate": 1024, "keep": 0.25}  # the widths of OLMoE


def quietest(calls: dict[str, Call], seconds: float) -> tuple[dict[str, list[float]], float]:
    """As `take_turns`; once more if others used more than `OTHERS` of a core meanwhile."""
    best = take_turns(calls, seconds)
    return best if best[1] <= OTHERS else min(best, take_turns(calls, seconds), key=lambda found: found[1])


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
        self.together = self._endless(lambda: Siblings(self._mixt()), small)
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
            return layers(x), layers.cores

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


def peak(call: Call, *alive: Tensor) -> int:
    """Bytes of tensors beside `alive` at the worst moment of the call; what the kernel allocates is seen."""
    with torch.no_grad(), LiveBytes() as mode:
        mode.known |= {tensor.untyped_storage()._cdata for tensor in alive}
        outputs = call()
    del outputs
    return mode.peak


def memory_rows() -> Iterator[Row]:
    """Activation memory of a forward pass without gradients: outputs and everything that is alive beside them."""
    for (model, names), (I, out_features) in GROUPS.items():
        layers: list[Any] = [filled(MixT(I, O, num_branches=4), torch.float32) for O in out_features]
        for tokens in (1, 128, 1024, 4096):
            used = {"dense": 4 * tokens * sum(out_features), **memory_of(layers, torch.randn(tokens, I))}
            case = {"kind": "memory", "model": model, "layers": names, "tokens": tokens}
            yield from ({**case, "layer": name, "bytes": number} for name, number in used.items())


def memory_of(layers: list[Any], x: Tensor) -> dict[str, int]:
    """Of both forms; the kernels are called past the dispatcher, which would hide what they allocate."""
    stacked = Siblings(layers)
    sizes = 2, stacked.core_bonds, stacked.out_features

    def separate() -> list[Tensor]:
        return [cpu.mixt(x, layer.cores, 2, layer.out_features) for layer in layers]

    def together() -> list[Tensor]:
        return siblings.mixt_siblings(x, stacked.cores, *sizes, cpu.mixt, siblings.MOST)

    cores = [core for layer in layers for core in layer.cores]
    return {"separate": peak(separate, x, *cores), "together": peak(together, x, *stacked.cores)}


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
def expert_rows() -> Iterator[Row]:
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
            yield from in_cpu_time(case, calls, "low rank, one by one", rounds=3 if tokens > 128 else 5)


def in_cpu_time(case: Row, calls: dict[str, Call], against: str, rounds: int) -> Iterator[Row]:
    """CPU time of one thread, in turns: other processes lengthen the wall clock, and this one hardly."""
    if str(case) in DONE:
        return
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["siblings", "memory", "model", "experts"])
    parser.add_argument("--missing", action="store_true", help="only cases of which there is no row yet")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    stamp = {"benchmark": "fused", "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    makers = {"siblings": sibling_rows, "memory": memory_rows, "model": model_rows, "experts": expert_rows}
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
