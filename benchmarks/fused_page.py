"""Make docs/siblings.md of the newest rows of benchmarks/results/fused.jsonl.

python benchmarks/fused_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "fused.jsonl"
PAGE = ROOT / "docs" / "siblings.md"
CASE = (
    "part",
    "kind",
    "model",
    "layers",
    "experts",
    "in_features",
    "out_features",
    "weights",
    "pass",
    "tokens",
    "layer",
)
Row = dict[str, Any]


def newest() -> list[Row]:
    """The last row of every case, in the order of the cases' first rows."""
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    return list({str([row.get(key) for key in CASE]): row for row in map(json.loads, lines)}.values())


def cases(rows: list[Row], kind: str) -> list[dict[str, Row]]:
    """The contestants of each case side by side."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(str([row.get(key) for key in CASE[:-1]]), {})[row["layer"]] = row
    return list(found.values())


def table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)) + "\n"


def milliseconds(row: Row) -> str:
    digits = 3 if row["median_ms"] < 10 else 1
    low, median, high = (f"{row[key]:.{digits}f}" for key in ("low_ms", "median_ms", "high_ms"))
    return f"{median} [{low}, {high}]"


def over(case: dict[str, Row], one: str, other: str) -> str:
    """How much faster `one` is than `other`; empty where one of them was not measured."""
    return f"{case[other]['median_ms'] / case[one]['median_ms']:.2f}" if one in case and other in case else ""


def siblings(rows: list[Row]) -> str:
    body = []
    for case in cases(rows, "siblings"):
        first = case["dense"]
        cells = [first["model"], first["layers"], first["pass"], str(first["tokens"]), first["weights"]]
        cells += [milliseconds(case[name]) for name in ("dense", "separate", "together")]
        cells += [over(case, "separate", "dense"), over(case, "together", "dense"), over(case, "together", "separate")]
        body.append(cells)
    head = ["model", "layers", "pass", "tokens", "weights", "dense ms [quartiles]", "separate ms", "together ms"]
    return table([*head, "separate / dense", "together / dense", "together / separate"], body)


def memory(rows: list[Row]) -> str:
    body = []
    for case in cases(rows, "memory"):
        first = case["dense"]
        cells = [first["model"], first["layers"], str(first["tokens"])]
        body.append([*cells, *(f"{case[name]['bytes'] / 2**20:.2f}" for name in ("dense", "separate", "together"))])
    return table(["model", "layers", "tokens", "dense MiB", "separate MiB", "together MiB"], body)


def models(rows: list[Row]) -> str:
    body = []
    for case in cases(rows, "model"):
        for name, row in case.items():
            cells = [row["model"], f"{row['pass']}, {row['tokens']}", name, str(row["groups"]), milliseconds(row)]
            body.append([*cells, f"{row['speedup']:.3f}"])
    return table(["model", "pass, tokens", "layers", "groups together", "ms [quartiles]", "speedup"], body)


def experts(rows: list[Row]) -> str:
    body = []
    for case in cases(rows, "experts"):
        first = case["low rank, one by one"]
        cells = [f"{first['visited']} of {first['experts']}", str(first["tokens"]), milliseconds(first)]
        names = ("low rank, grouped_mm", "low rank, bmm", "mixt, one by one")
        body.append([*cells, *(f"{case[name]['speedup']:.2f}" if name in case else "" for name in names)])
    head = ["experts", "tokens", "low rank, one by one: ms [quartiles]", "grouped_mm", "bmm", "MixT, one by one"]
    return table(head, body)


def low_rank(rows: list[Row]) -> str:
    """Low rank, layer by layer, beside the larger of its bytes and its multiply-accumulates at the measured best."""
    best = next(row for row in rows if row["kind"] == "machine")
    body = []
    for case in cases(rows, "siblings"):
        row = case.get("low rank")
        if row is None:
            continue
        I, numbers = row["in_features"], sum(row["in_features"] * O // 16 for O in row["out_features"])
        moved = 4 * (numbers + row["tokens"] * len(row["out_features"]) * I + row["tokens"] * sum(row["out_features"]))
        macs = row["tokens"] * numbers
        floor = max(macs / best["gmacs_per_second"], moved / best["gbytes_per_second"]) / 1e6
        cells = [row["model"], row["layers"], str(row["tokens"]), row["weights"], milliseconds(row)]
        body.append([*cells, f"{100 * floor / row['median_ms']:.0f}", over(case, "low rank together", "low rank")])
    head = ["model", "layers", "tokens", "weights", "low rank ms [quartiles]", "% of roofline", "together / separate"]
    return table(head, body)


def verdict(rows: list[Row]) -> str:
    """How much faster together is than separate, by what is asked."""
    lines = []
    forward = [case for case in cases(rows, "siblings") if case["dense"]["pass"] == "forward"]
    for tokens, weights in (1, "cold"), (1, "warm"), (8, "cold"), (128, "warm"), (1024, "warm"):
        found = [
            case["separate"]["median_ms"] / case["together"]["median_ms"]
            for case in forward
            if (case["dense"]["tokens"], case["dense"]["weights"]) == (tokens, weights)
        ]
        many = "token" if tokens == 1 else "tokens"
        lines.append(f"* {tokens} {many}, {weights} weights: {min(found):.2f} to {max(found):.2f} times as fast")
    return "\n".join(lines) + "\n"


def page() -> str:
    rows = newest()
    machines = next(row for row in rows if row["kind"] == "machine")
    timed = [row for row in rows if "others_cpu" in row]
    return TEXT.format(
        processor=machines["environment"]["hardware"]["processor"],
        torch=machines["environment"]["versions"]["torch"],
        days=", ".join(sorted({row["measured"][:10] for row in rows})),
        commits=", ".join(sorted({row["environment"]["commit"] for row in rows})),
        quiet=max(row["others_cpu"] for row in timed),
        peak=f"{machines['gmacs_per_second']:.0f} GMAC/s, {machines['gbytes_per_second']:.1f} GB/s",
        verdict=verdict(rows),
        siblings=siblings(rows),
        memory=memory(rows),
        models=models(rows),
        experts=experts(rows),
        low_rank=low_rank(rows),
    )


TEXT = """# Layers that read the same input

Made by `python benchmarks/fused_page.py` from the rows of `python benchmarks/fused.py`; do not edit by hand.

`tensormix.fuse_siblings` makes q, k and v of a block, or gate and up, one MixT: their cores stack along the core-out
bond, x is read once, and fewer operations are started. N_T = 4, d = 2, padding `multiple`, float32.

* Measured on {days}: {processor}, 2 threads, PyTorch {torch}, commit {commits}. Nothing was measured on a GPU.
* Other processes used at most {quiet:.2f} of a core meanwhile; disturbed cases have no row.
* Best matrix product and best reading speed: {peak}.

What one call for all gains over one call for each:

{verdict}
So it pays for one token and a few, most for narrow layers; for many tokens multiplying is the cost and little is
gained. Beyond two million outputs (95 tokens of gate and up) a call multiplies one layer after another, because
cutting the outputs apart would cost more than one product saves.

`separate` is one call for each layer, `together` one for all; "a / b" says how many times as fast a is as b.

{siblings}
## Whole blocks

All linear layers MixT, 8 blocks, random weights; one token after 64.

{models}
## Activation memory

MiB alive beside the input at the worst moment of a forward pass without gradients. Dense layers make the outputs;
`separate` and `together` make the same ones and scratch: the kernel's own tiles, and `together` either the outputs once
more or a copy of the cores of one layer. It does not grow with the tokens, but "at most the memory of
the dense layers" is missed by it.

{memory}
## Low rank beside its own roofline

As many parameters as MixT, two `F.linear` for each layer, no kernel of ours. Around 100 % and
above, weights come from the cache or reading is as fast as it gets.
`together` multiplies the right factors of all layers as one matrix: that gains in some cases and loses in others, so
low rank is not fused, and two products that PyTorch runs in its own kernels need none of ours. There is no tensor train
in this version.

{low_rank}
## Experts

The experts of one block of OLMoE's widths (2048, 1024), low rank with a quarter of the numbers, routed at random; the
others stack the factors of all experts and multiply sorted tokens with `grouped_mm`, or with `bmm` padded to the
busiest expert. In CPU time of one thread, beside other work. Ratios over low rank one by one: grouped products gain for
a few tokens for each expert and lose where there are many, `bmm` multiplies what nobody asked for. What `Experts` runs
today is measured in [performance.md](performance.md).

{experts}
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
