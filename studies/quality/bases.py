"""Whether other weights for the same function lower the error of one aware mixture, and below that of low rank.

    python studies/quality/bases.py --model src/tensormix/demo/model --num-branches 3 4
    python studies/quality/bases.py --model ../shared/data/models/stories260K --num-branches 3 \\
        --text ../shared/data/text/tinystories_1000.json
    python studies/quality/bases.py --tables     # those of docs/structures.md

A dense model is rewritten in each way of `REWRITINGS`, its logits are checked to be the same, and every linear layer
of `--blocks` is fitted by an aware mixture, and by whitened low rank of at least as many numbers, in the same weights.
A row holds the mean relative output error of each role, in how many layers the mixture has less error, and what both
do to the model when they replace all layers of these blocks: the KL divergence on unseen tokens. Rows go to
studies/quality/bases.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormix.compression.observing import observe
from tensormix.data import calibration_batches
from tensormix.evaluate.divergence import divergences
from tensormix.fitting.whitening import gram_root
from tensormix.methods import Mixt, SvdLlm
from tensormix.models import load_model, load_tokenizer
from tensormix.reparameterise import (
    align_heads,
    balance_values,
    check_equal,
    learn_bases,
    permute_heads,
    residual_basis,
    rotate_pairs,
    rotate_residual,
    sort_neurons,
    whiten_values,
)
from tensormix.settings import Source
from tensormix.sites import Site, blocks, find_sites, install
from tensormix.statistics import Gram
from tensormix.storage.files import environment, now

ROWS = Path(__file__).with_name("bases.jsonl")
WINDOW, WINDOWS, UNSEEN = 256, 16, 4  # tokens; of calibration; for the KL divergence
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
DENSE = "dense PCA bases of inputs and outputs (not free)"
LEARNED = "learned rotation of the stream and of the values"


class Study:
    """One model, its text, and the layers that are measured."""

    def __init__(self, folder: Path, source: Source, chosen: list[int] | None, method: Mixt, steps: int) -> None:
        self.folder, self.method, self.steps = folder, method, steps
        batches = calibration_batches(
            load_tokenizer(folder), source, num_windows=WINDOWS + UNSEEN, window=WINDOW, seed=0
        )
        self.batches, self.unseen = batches[:WINDOWS], batches[WINDOWS:]
        self.blocks = chosen if chosen is not None else list(range(len(blocks(self.model()))))

    def model(self) -> Any:
        return load_model(self.folder, "float32").eval()

    def sites(self, model: Any) -> dict[str, Site]:
        return {s.name: s for s in find_sites(model) if s.kind == "linear" and s.block in self.blocks}

    @torch.no_grad()
    def grams(self, model: Any) -> dict[str, Gram]:
        """Of the inputs of all linear layers of the model."""
        sites = {site.name: site for site in find_sites(model) if site.kind == "linear"}
        stats: dict[str, list[dict[type, Any]]] = {n: [{Gram: Gram(s.in_features)}] for n, s in sites.items()}
        with observe(model, sites, stats):
            for batch in self.batches:
                model(batch)
        return {name: seen[0][Gram] for name, seen in stats.items()}

    def means(self, model: Any) -> dict[str, Tensor]:
        return {name: gram.mean for name, gram in self.grams(model).items()}

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        return torch.cat([model(batch).logits for batch in self.unseen])


Rewriting = Callable[[Study, Any], Any]


def _turned(model: Any) -> None:
    """A random rotation: what the axes of the stream are worth by themselves."""
    width = model.config.hidden_size
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotate_residual(model, torch.linalg.qr(noise).Q)


def _sorted_stream(study: Study, model: Any) -> None:
    rotate_residual(model, residual_basis(model, study.batches, study.blocks))


def _learned(study: Study, model: Any) -> None:
    facts = learn_bases(model, dict.fromkeys(study.sites(model), study.method), study.batches, steps=study.steps)
    print(f"  {facts}")


def _together(study: Study, model: Any) -> None:
    """Everything that may be done at once, in an order in which none undoes another."""
    _sorted_stream(study, model)
    try:
        rotate_pairs(model, study.means(model))
    except ValueError as reason:  # a norm behind q and k
        print(f"  without turned pairs: {reason}")
    balance_values(model, study.means(model))
    permute_heads(model)
    sort_neurons(model)


REWRITINGS: dict[str, Rewriting] = {
    "as it is": lambda study, model: None,
    "sorted neurons": lambda study, model: sort_neurons(model),
    "permuted heads": lambda study, model: permute_heads(model),
    "principal values": lambda study, model: align_heads(model, study.means(model)),
    "white values": lambda study, model: whiten_values(model, study.means(model)),
    "balanced values": lambda study, model: balance_values(model, study.means(model)),
    "turned pairs of q and k": lambda study, model: rotate_pairs(model, study.means(model)),
    "random rotation of the stream": lambda study, model: _turned(model),
    "principal rotation of the stream": _sorted_stream,
    "all together": _together,
    LEARNED: _learned,
}


@torch.no_grad()
def measure(study: Study, what: str) -> dict[str, Any]:
    model = study.model()
    before = study.logits(model)
    if what != DENSE:
        REWRITINGS[what](study, model)
        check_equal(before, study.logits(model))
    seen, errors, rivals = study.grams(model), defaultdict(list), defaultdict(list)
    smaller = {"mixt": copy.deepcopy(model), "low_rank": copy.deepcopy(model)}
    for name, site in study.sites(model).items():
        fit = _fit_between_dense_bases if what == DENSE else _fit
        error, rival, operators = fit(site.weight, seen[name], study.method)
        errors[str(site.role)].append(error)
        rivals[str(site.role)].append(rival)
        for kind, operator in operators.items():
            install(smaller[kind], name, operator)
    kl = {kind: float(divergences(before, study.logits(one)).mean()) for kind, one in smaller.items()}
    return {
        "error": {role: sum(values) / len(values) for role, values in errors.items()},
        "rival_error": {role: sum(values) / len(values) for role, values in rivals.items()},
        "wins": {role: sum(a < b for a, b in zip(errors[role], rivals[role], strict=True)) for role in errors},
        "layers": {role: len(values) for role, values in errors.items()},
        "kl": None if what == DENSE else kl,
    }


def _fit(weight: Tensor, gram: Gram, method: Mixt) -> tuple[float, float, dict[str, Any]]:  # (O, I)
    """The errors of the mixture and of whitened low rank of at least as many numbers, and both operators."""
    mixture, facts = method.fit_with_facts(weight, {Gram: gram})
    rank = ceil(mixture.num_params / sum(weight.shape))
    values = torch.linalg.svdvals(weight.double() @ gram_root(gram.mean)).square()
    keep = min(1.0, (rank + 0.5) * sum(weight.shape) / weight.numel())  # which is rounded down to that rank
    low_rank = SvdLlm(keep=keep).fit(weight, {Gram: gram})
    assert low_rank.num_params >= mixture.num_params
    rival = float((values[rank:].sum() / values.sum()).sqrt())
    return facts["output_error"], rival, {"mixt": mixture, "low_rank": low_rank}


def _fit_between_dense_bases(weight: Tensor, gram: Gram, method: Mixt) -> tuple[float, float, dict[str, Any]]:  # (O, I)
    """The same where inputs and outputs are turned into their principal components, which nothing pays for."""
    root = gram_root(gram.mean)  # (I, K)
    inputs = torch.linalg.eigh(gram.mean).eigenvectors.flip(1)
    outputs = torch.linalg.eigh(weight.double() @ gram.mean @ weight.double().T).eigenvectors.flip(1)
    turned = Gram(gram.in_features)
    turned.update((inputs.T @ root).T)
    error, rival, _ = _fit((outputs.T @ weight.double() @ inputs).to(weight), turned, method)
    return error, rival, {}


def tables(rows: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Of each model and number of branches: a line per rewriting, from the last row there is of it."""
    last = {(row["model"], row["num_branches"], row["weights"]): row for row in rows}
    found: dict[tuple[str, int], list[str]] = {}
    for (model, branches, what), row in last.items():
        head = [f"| {model}, N_T = {branches} | {' | '.join(ROLES)} | KL |", "|---" * (len(ROLES) + 2) + "|"]
        lines = found.setdefault((model, branches), head)
        cells = [_cell(row["error"][role], row["rival_error"][role]) for role in ROLES]
        kl = "" if row["kl"] is None else _cell(row["kl"]["mixt"], row["kl"]["low_rank"])
        lines.append(f"| {what} | {' | '.join(cells)} | {kl} |")
    return {key: "\n".join(lines) + "\n" for key, lines in found.items()}


def _cell(ours: float, rival: float) -> str:
    return f"{'**' if ours < rival else ''}{ours:.2f}{'**' if ours < rival else ''} ({rival:.2f})"


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--name", help="of the model in the rows; without it that of the folder")
    parser.add_argument("--text", type=Path, help="of the calibration; without it questions of the exam")
    parser.add_argument("--blocks", type=int, nargs="+", help="without it all")
    parser.add_argument("--num-branches", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=200, help="of L-BFGS, of what is learned")
    parser.add_argument("--only", nargs="+", choices=[*REWRITINGS, DENSE], default=[*REWRITINGS, DENSE])
    parser.add_argument("--tables", action="store_true", help="print the rows as tables instead")
    asked = parser.parse_args()
    if asked.tables:
        print("\n".join(tables(read()).values()))
        return
    source = Source(file=str(asked.text)) if asked.text else Source(exam=True, seed=5)
    for branches in asked.num_branches:
        study = Study(asked.model, source, asked.blocks, Mixt(num_branches=branches, init="aware"), asked.steps)
        for what in asked.only:
            try:
                measured = measure(study, what)
            except ValueError as reason:  # no identity for this architecture
                print(f"{what}: {reason}", flush=True)
                continue
            about = {"study": "bases", "model": asked.name or asked.model.name, "weights": what}
            row = {**about, "num_branches": branches, "blocks": study.blocks, "steps": study.steps, **measured}
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "measured": now(), "environment": environment()}) + "\n")
            print(
                what, {role: f"{v:.3f} {row['rival_error'][role]:.3f}" for role, v in row["error"].items()}, row["kl"]
            )


if __name__ == "__main__":
    main()
