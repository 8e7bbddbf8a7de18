"""What each way of rounding loses of the outputs of four layers of one block, on tokens that it was not fitted to.

    python studies/rounding/layers.py --model build/smollm2 --data ../shared/data

Fitted on the 16 windows of C4 of the study, judged on 4 windows that follow them: the squared error of the outputs over
their squares. All layers see the inputs of the dense model. One row for each layer and method in layers.jsonl, written
anew when all are there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from tensormix.data import packed_source
from tensormix.fitting.output_error import output_error
from tensormix.methods import Gptq, Hqq, RoundedLowRank, RoundedSparse, Rtn, SvdLlm
from tensormix.models import load_model, load_tokenizer
from tensormix.settings import Source
from tensormix.statistics import Gram, HeldOutGram
from tensormix.storage.files import environment, now, write_text

HERE = Path(__file__).parent
BLOCK = 10
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
FITTED, JUDGED, WINDOW, SKIPPED = 16, 4, 512, 40  # windows, and documents that perplexity is judged on

TWO: dict[str, Any] = {"bits": 2, "group": 64}
METHODS = [
    Rtn(bits=2, group=64, symmetric=False),
    Hqq(**TWO),
    Hqq(**TWO, with_scales=True),
    Gptq(**TWO),
    Gptq(bits=2, group=32),
    Gptq(**TWO, zero_bits=8),
    RoundedSparse(**TWO, share=0.005),
    RoundedSparse(**TWO, share=0.01),
    RoundedLowRank(**TWO, rank=8),
    RoundedLowRank(**TWO, rank=16, rounds=1),
    RoundedLowRank(**TWO, rank=16),
    RoundedLowRank(**TWO, rank=16, correction_bits=8),
    RoundedLowRank(**TWO, rank=32),
    RoundedLowRank(**TWO, zero_bits=8, rank=32),
    Rtn(bits=3, group=64, symmetric=False),
    Hqq(bits=3, group=64),
    Hqq(bits=3, group=64, with_scales=True),
    Gptq(bits=3, group=64),
    Gptq(bits=3, group=64, zero_bits=8),
    Gptq(bits=4, group=64, of=SvdLlm(keep=0.8)),
]


@torch.no_grad()
def gathered(options: argparse.Namespace) -> dict[str, Any]:
    """Layer -> its weight, what it was fitted to, and the Gram matrix that judges."""
    model, tokenizer = load_model(options.model, dtype="float32"), load_tokenizer(options.model)
    model.model.layers = model.model.layers[: BLOCK + 1]
    file = Source(file=str(options.data / "text/c4_300.jsonl"), skip_documents=SKIPPED)
    ids = packed_source(tokenizer, file)[: (FITTED + JUDGED) * WINDOW].view(-1, 1, WINDOW)
    found, seen = {}, []
    for name in LAYERS:
        layer = model.model.layers[BLOCK].get_submodule(name)
        kinds = {kind: kind(layer.in_features) for kind in (Gram, HeldOutGram)}
        judge = Gram(layer.in_features)
        seen.append((layer, list(kinds.values()), judge))
        found[name] = (layer.weight.detach(), kinds, judge)
    for number, batch in enumerate(ids):
        hooks = [
            layer.register_forward_pre_hook(watching(kinds if number < FITTED else [judge]))
            for layer, kinds, judge in seen
        ]
        model.model(batch, use_cache=False)
        for hook in hooks:
            hook.remove()
    return found


def watching(statistics: list[Any]) -> Any:
    def hook(_: Any, args: tuple[Any, ...]) -> None:
        for statistic in statistics:
            statistic.update(args[0])

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    options = parser.parse_args()
    rows = []
    for name, (weight, stats, judge) in gathered(options).items():
        whole = output_error(weight.double(), judge.mean)
        for method in METHODS:
            began = time.perf_counter()
            op, facts = method.fit_with_facts(weight, stats)
            seconds = time.perf_counter() - began
            error = output_error(weight.double() - op.to_dense().detach().double(), judge.mean) / whole
            row = {
                "layer": f"{BLOCK}.{name}",
                "method": method.model_dump(exclude_defaults=True) | {"name": method.name},
                "bits_per_number": op.num_bits / weight.numel(),
                "error": error,
                "rounding": facts.get("rounding"),
                "round_errors": facts.get("round_errors"),
                "seconds": round(seconds, 2),
            }
            print(row["layer"], row["method"], round(row["bits_per_number"], 3), round(error, 5), flush=True)
            rows.append(row | {"model": options.model.name, "environment": environment(), "finished": now()})
    write_text(HERE / "layers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
