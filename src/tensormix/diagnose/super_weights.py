"""Super weights: single numbers of a down projection on which the model hangs (Yu et al. 2024, arXiv 2411.07191).

Such a weight joins a large input to an output that towers above all others. The search looks for exactly that: at the
token and channel of the largest output of each down projection, one product W_ij x_j makes most of it. What is found is
set to zero, the loss is measured, and the search repeats, so that a second one is not hidden behind the first; at the
end every number is put back.

Legend: N tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tensormix.diagnose.base import Batches, Diagnostic, Row, mean_loss, run_hooked
from tensormix.sites import Site, find_sites, opened


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The weight behind the largest output of a site."""

    site: Site
    expert: int
    row: int  # output channel
    column: int  # input channel
    output: float  # the output with it
    input: float  # the input that it multiplies
    spike: float  # |output| / median |output| of the site
    share: float  # of the output that this one product makes

    @property
    def weight(self) -> Tensor:  # (O, I), a view of the model's own numbers
        return self.site.expert_weight(self.expert)

    @property
    def value(self) -> float:
        return float(self.weight[self.row, self.column])


class SuperWeights(Diagnostic):
    """Weights of down projections that alone make an output far above all others, and the loss without each.

    Rows of kind "super_weight" in the order of the search; `loss_without` is measured with this one and all before it
    at zero. Afterwards a row of kind "super_weights" with their number.

    Raises ValueError without batches.
    """

    looks_at: ClassVar[Literal["dense", "pair"]] = "dense"
    name: Literal["super_weights"] = "super_weights"
    spike: float = Field(default=50.0, gt=1)  # times the median output of the site; normal noise reaches about 8
    share: float = Field(default=0.5, gt=0, le=1)  # of the output that one product has to make
    most: int = Field(default=8, ge=1)  # found before the search stops

    def measure(self, model: nn.Module, batches: Batches) -> list[Row]:
        loss, rows = mean_loss(model, batches), []
        with _kept() as zero:
            while len(rows) < self.most and (found := self.search(model, batches)) is not None:
                row = {
                    "kind": "super_weight",
                    "site": found.site.name,
                    "block": found.site.block,
                    "expert": found.expert if found.site.kind == "experts" else None,
                    "row": found.row,
                    "column": found.column,
                    "value": found.value,
                    "input": found.input,
                    "output": found.output,
                    "spike": found.spike,
                    "share": found.share,
                    "loss": loss,
                }
                zero(found)
                rows.append({**row, "loss_without": mean_loss(model, batches)})
        return [*rows, {"kind": "super_weights", "value": len(rows), "searched": len(down_sites(model))}]

    def search(self, model: nn.Module, batches: Batches) -> Candidate | None:
        """The candidate with the largest spike among those that pass both thresholds."""
        found = [c for c in candidates(model, batches) if c.spike >= self.spike and c.share >= self.share]
        return max(found, key=lambda candidate: candidate.spike, default=None)


def down_sites(model: nn.Module) -> list[Site]:
    return [site for site in find_sites(model) if site.role == "down"]


def candidates(model: nn.Module, batches: Batches) -> list[Candidate]:
    """For each down projection, and each expert of a stack, the weight behind its largest output over all batches."""
    best: dict[tuple[str, int], Candidate] = {}
    sites = {site.name: site for site in down_sites(model)}

    def watch(site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            expert = int(args[1]) if site.kind == "experts" else 0
            if args[0].numel():
                found = _largest(site, expert, args[0].flatten(0, -2), output.flatten(0, -2))
                if (known := best.get((site.name, expert))) is None or found.spike > known.spike:
                    best[site.name, expert] = found

        return hook

    with opened(model, list(sites.values())) as modules:
        run_hooked(model, batches, [modules[name].register_forward_hook(watch(site)) for name, site in sites.items()])
    return list(best.values())


def _largest(site: Site, expert: int, inputs: Tensor, outputs: Tensor) -> Candidate:  # (N, I), (N, O)
    size = outputs.float().abs()
    token, row = divmod(int(size.argmax()), size.shape[1])
    products = site.expert_weight(expert)[row].float() * inputs[token].float()  # (I,)
    column = int(products.abs().argmax())
    output, median = float(outputs[token, row]), float(size.median())
    return Candidate(
        site=site,
        expert=expert,
        row=row,
        column=column,
        output=output,
        input=float(inputs[token, column]),
        spike=abs(output) / max(median, torch.finfo(torch.float32).tiny),
        share=float(products[column]) / output if output else 0.0,
    )


@contextmanager
def _kept() -> Iterator[Any]:
    """Gives a function that sets a candidate to zero; every number is put back at the end, also after an error."""
    kept: list[tuple[Candidate, Tensor]] = []

    def zero(candidate: Candidate) -> None:
        kept.append((candidate, candidate.weight[candidate.row, candidate.column].clone()))
        candidate.weight[candidate.row, candidate.column] = 0

    try:
        yield zero
    finally:
        for candidate, value in reversed(kept):
            candidate.weight[candidate.row, candidate.column] = value
