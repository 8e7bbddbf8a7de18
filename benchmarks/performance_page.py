"""Make docs/performance.md of the newest rows of benchmarks/results/speed.jsonl.

python benchmarks/performance_page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grouped_experts import ratios
from profile_page import NOTHING, choices, memory, profile, shape
from speed import COMPILED_TOKENS, MODELS, SHAPES, TOKENS

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "speed.jsonl"
PAGE = ROOT / "docs" / "performance.md"
TARGETS = {  # (pass, tokens) -> the speedup over dense that was asked for, float32
    ("forward", 1): 8.0,
    ("forward", 128): 1.8,
    ("forward", 1024): 1.75,
    ("forward and backward", 1024): 1.6,
}
CASE = ("kind", "part", "model", "dtype", "in_features", "out_features", "weights", "pass", "tokens", "layer")
Row = dict[str, Any]


def newest(lines: Iterable[str]) -> list[Row]:
    """The last row of every case, in the order of the cases' first rows."""
    return list({tuple(row.get(key) for key in CASE): row for row in map(json.loads, lines)}.values())


def table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)) + "\n"


def milliseconds(row: Row) -> str:
    digits = 3 if row["median_ms"] < 10 else 1
    low, median, high = (f"{row[key]:.{digits}f}" for key in ("low_ms", "median_ms", "high_ms"))
    return f"{median} [{low}, {high}]"


def by_layer(rows: list[Row]) -> list[dict[str, Row]]:
    """The contestants of each case side by side."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row.get(key) for key in CASE[:-1]), {})[row["layer"]] = row
    return list(cases.values())


def targets(rows: list[Row]) -> str:
    body, missed = [], []
    for case in by_layer([row for row in rows if row["kind"] == "layer" and row["part"] in SHAPES]):
        row = case["mixt"]
        wanted = TARGETS.get((row["pass"], row["tokens"]))
        if wanted is None:
            continue
        met = row["speedup"] >= wanted
        missed += [] if met else [row]
        cells = [row["model"], shape(row), row["pass"], str(row["tokens"]), row["weights"], f"{wanted:g}"]
        body.append([*cells, f"{row['speedup']:.3f}", "met" if met else "**missed**"])
    head = ["model", "layer", "pass", "tokens", "weights", "target", "measured", ""]
    counted = f"{len(missed)} missed. Where their time goes:\n\n" if missed else "All met.\n"
    return table(head, body) + "\n" + counted + profile(missed)


def speeds(rows: list[Row], wanted: Callable[[Row], bool], names: list[str]) -> str:
    body = []
    for case in by_layer([row for row in rows if row["kind"] == "layer" and wanted(row)]):
        first = case["dense"]
        cells = [shape(first), first["pass"], str(first["tokens"]), first["weights"], milliseconds(first)]
        for name in names:
            row = case.get(name)
            cells.append("" if row is None else f"{row['speedup']:.2f}")
        cells.append(milliseconds(case["mixt"]))
        cells += [f"{100 * case[name]['of_roofline']:.0f}" for name in ("dense", "mixt")]
        body.append(cells)
    head = ["layer", "pass", "tokens", "weights", "dense ms [quartiles]", *names]
    head += ["mixt ms [quartiles]", "dense, % of roofline", "mixt, % of roofline"]
    return table(head, body) if body else NOTHING


def models(rows: list[Row]) -> str:
    body = [
        [
            row["pass"],
            str(row["tokens"]),
            f"{row['compressed']} of {row['blocks']}" if row["layer"] == "mixt" else "none",
            f"{row['parameters'][row['layer']]:,}",
            milliseconds(row),
            f"{row['speedup']:.2f}",
        ]
        for row in rows
        if row["kind"] == "model"
    ]
    return table(["pass", "tokens", "blocks compressed", "parameters", "ms [quartiles]", "speedup"], body)


def slower(rows: list[Row]) -> str:
    """The cases in bfloat16 in which MixT is slower than dense, and where their time goes."""
    cases = [row for row in rows if row["kind"] == "layer" and row["part"] == "bfloat16" and row["layer"] == "mixt"]
    behind = [row for row in cases if row["speedup"] < 1]
    if not behind:
        return f"MixT is faster than dense in each of these {len(cases)} cases.\n"
    return (
        f"MixT is slower than dense in {len(behind)} of these {len(cases)} cases. Where their time goes:\n\n"
        + profile(behind)
    )


def unmeasured(rows: list[Row]) -> str:
    """The cases of the benchmark in float32 of which there is no row."""
    layers = [row for row in rows if row["kind"] == "layer" and row["dtype"] == "float32"]
    done = {(row["in_features"], row["out_features"], row["pass"], row["tokens"]) for row in layers}
    gaps = []
    for part, shapes in SHAPES.items():
        for (I, O), kind in ((sizes, kind) for sizes in shapes for kind in ("forward", "forward and backward")):
            tokens = [str(n) for n in TOKENS if (I, O, kind, n) not in done]
            if tokens:
                gaps.append(f"{MODELS[part]} {I} -> {O}, {kind}, at {', '.join(tokens)} tokens")
    return f"**Not measured yet:** {'; '.join(gaps)}.\n" if gaps else ""


def page(rows: list[Row]) -> str:
    first = rows[0]["environment"]
    machines = [row for row in rows if row["kind"] == "machine"]
    quiet = max(row["others_cpu"] for row in rows)
    peaks = "; ".join(
        f"{row['dtype']} ({row['part']}): {row['gmacs_per_second']:.0f} GMAC/s, {row['gbytes_per_second']:.1f} GB/s"
        for row in machines
    )
    commits = ", ".join(sorted({row["environment"]["commit"] for row in rows}))
    tables = {part: speeds(rows, lambda row, p=part: row["part"] == p, names) for part, names in NAMES.items()}
    return TEXT.format(
        processor=first["hardware"]["processor"],
        threads=first["hardware"]["threads"],
        torch=first["versions"]["torch"],
        commits=commits,
        days=", ".join(sorted({row["measured"][:10] for row in rows})),
        quiet=quiet,
        peaks=peaks,
        gaps=unmeasured(rows),
        targets=targets(rows),
        **tables,
        slower=slower(rows),
        compiled_tokens=" and ".join(str(tokens) for tokens in COMPILED_TOKENS),
        memory=memory(rows, table),
        choices=choices(rows, table),
        models=models(rows),
        experts=table(["block", "dtype", "stack", "1", "16", "256", "256, with gradients"], ratios()),
    )


NAMES = {
    "llama": ["mixt", "low rank", "int8 dynamic", "int8 torchao"],
    "qwen": ["mixt", "low rank", "int8 dynamic", "int8 torchao"],
    "bfloat16": ["mixt", "low rank", "int8 torchao", "int4 torchao"],
    "compiled": ["mixt", "mixt compiled", "reference compiled"],
}
TEXT = """# How fast it is

Made by `python benchmarks/performance_page.py` from the rows of `python benchmarks/speed.py`; do not edit by hand.

* Measured on {days}: {processor}, {threads} threads, PyTorch {torch}, commit {commits}.
* Other processes used at most {quiet:.2f} of a core meanwhile.
* Best matrix product and best reading speed, on which the rooflines rest: {peaks}.

**No GPU was available: nothing here says anything about one.** The Triton kernel is tested for its results, under
Triton's interpreter, and its speed is unknown; CUDA graphs were not tried either.

Columns named after a layer give its speed over dense: 2 is twice as fast. `mixt` is MixT with 4 branches, bond 2,
padding `multiple`: 1/16 of the dense numbers and half of its multiply-accumulates, so at most 16 times as fast where
reading weights is the cost and 2 times where multiplying is. `low rank` has as many parameters as `mixt`, and 1/8 of
its multiply-accumulates: it is faster, but no full-rank map. `int8 dynamic` is PyTorch's own quantised linear layer,
`int8 torchao` torchao's: both quantise their inputs at each call. `int4 torchao` stores groups of 128 weights; its
kernel is made for few tokens in bfloat16 (in float32 it took 40 times as long as dense) and was timed up to 128 tokens.
`cold` weights are read from memory as in a model, `warm` ones from the cache.

## Targets (CPU, float32, one layer)

{gaps}
{targets}
What keeps the targets of one token out of reach: the 16 times is a ratio of bytes, but each branch is a product of 8
rows, which reads its core more slowly than a dense layer of one row reads its matrix, and four products, three
rearrangements of x and four additions to y begin one after the other. Layers as narrow as 4096 -> 1024 are done before
that is over.

## LLaMA-2-7B layers, float32

{llama}
## Qwen3-8B layers, float32

(q and o are 4096 -> 4096 as above.)

{qwen}
## LLaMA-2-7B layers, bfloat16

{bfloat16}
{slower}
`tensormix.dense_where_faster` measures both forms of every layer on the machine at hand and runs the faster one. What
it measured and chose in bfloat16:

{choices}
## Compiled

`torch.compile` at {compiled_tokens} tokens (float32): of the operator, which it calls as it is, and of the operator's
meaning in plain PyTorch, of which it makes kernels of its own.

{compiled}
## Memory

How far one call raises the resident memory of the process: output, scratch, gradients, and what libraries allocate
inside. A forward pass of MixT keeps a tile of the inputs and one of the outputs, of 128 tokens in float32, and from 512
tokens on one joined core of as many numbers as all its cores; none of it grows with the tokens. Training saves nothing
but the input, as a dense layer does, and its gradients are as small as its cores.

{memory}
## Whole model

Blocks of the shape of LLaMA-2-7B with random weights in float32, as many as memory allowed, with embedding and tied
head; decoding after 128 tokens, one at a time.

{models}
## Experts

How many times as fast the experts of a block are in grouped products as in a loop over the experts, for 1, 16 and 256
tokens routed at random (`python benchmarks/grouped_experts.py`, CPU time of one thread, beside other work). Low rank
keeps a quarter of the numbers; behind the slash, over low-rank experts as modules of their own, as folders of earlier
versions have them. `Experts` takes the loop where a number is in brackets: fewer rows (tokens times experts that each
visits) than experts, where a call costs more than a few small products; and shared bases from as many rows on, though
grouped is faster there, because all bases at once take the room of dense experts. A gradient of one expert out of a
stack is as large as the stack, so training is always grouped but for those. Over modules of their own, training
low-rank experts in float32 is no faster.

{experts}"""


def main() -> None:
    PAGE.write_text(page(newest(ROWS.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
