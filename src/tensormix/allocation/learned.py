"""Ranks for a whole model, learned: one truncation position per site, trained by the loss within the budget.

The learned truncation of Dobi-SVD, arXiv 2502.02723, Section 3.1. The whole model must be in memory.
Shape letters: B sequences, T tokens, O out_features, I in_features, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, cos, floor, isfinite, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.fitting.soft_truncation import soft_truncation
from tensormix.sites import Site, find_sites

Storage = Literal["plain", "remapped"]
_UNROUND = 1 + 2**-50  # undoes the rounding of a fraction


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the positions are trained."""

    steps: int = 100  # of Adam; each sees one batch
    learning_rate: float = 0.02  # of the fraction of its dense cost that a site keeps; falls to 0 with a cosine
    sharpness: float = 2.0  # of the edge between what stays and what goes; the published 10 is flat between ranks
    seed: int = 0  # of the order of the batches


@dataclass(frozen=True)
class Sizes:
    """Of one site: what it costs dense and per rank, and its largest rank that costs less than dense."""

    dense: int
    per_rank: int
    largest: int
    full: int  # min(O, I)


def learned(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    keep: float,
    *,
    storage: Storage = "plain",
    training: Training = Training(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """The ranks with which the model loses least when all sites together keep the fraction `keep` of their dense cost.

    The outputs of every site, sequence by sequence, are softly truncated to as many singular values as its position
    says, and the positions alone are trained by the loss of the next token. Of T tokens at most min(T, O, I) singular
    values are not zero: a position is a fraction of those, and the rank that fraction of min(O, I), whatever T is.

    The paper adds a penalty for leaving the budget. Its slope hides what tells sites apart from Adam, whose steps do
    not depend on the length of a gradient; here every step stays on the budget instead, where the penalty's subgradient
    is what the sites have in common: a site gains what it lowers the loss per cost more than the others.

    Args:
        model: gives logits (B, T, vocabulary), as such or as `.logits`; it is left as it was.
        names: of the sites, linear layers.
        batches: token ids (B, T); batches of several sequences are faster.
        storage: a rank costs O + I numbers ("plain"), or max(O, I) ("remapped"), of O I.
        progress: called after each step with the steps done and in all.

    Raises:
        ValueError: a name is no linear site, there are no batches of at least two tokens, the budget cannot be met
            (the sentence says what can), or the loss is not finite.
    """
    sites = _linear_sites(model, names)
    sizes = {site.name: _sizes(site, storage) for site in sites}
    budget = _budget(sizes, keep)
    bounds = _Bounds(list(sizes.values()), budget, sites[0].weight.device)
    kept = _train(model, sites, list(batches), bounds, training, progress)
    wanted = [k * s.dense / s.per_rank for k, s in zip(kept.tolist(), sizes.values(), strict=True)]
    return _whole_ranks(dict(zip(sizes, wanted, strict=True)), sizes, budget)


class _Bounds:
    """What fraction of its dense cost each site may keep, and all of them together."""

    def __init__(self, sizes: list[Sizes], budget: int, device: torch.device) -> None:
        def of_sites(numbers: list[float]) -> Tensor:  # (S,)
            return torch.tensor(numbers, dtype=torch.float64, device=device)

        total = sum(s.dense for s in sizes)
        self.share = of_sites([s.dense / total for s in sizes])
        self.low = of_sites([s.per_rank / s.dense for s in sizes])
        self.high = of_sites([s.largest * s.per_rank / s.dense for s in sizes])
        self.positions = of_sites([s.dense / s.per_rank / s.full for s in sizes])  # of a kept fraction of 1
        self.keep = budget / total

    def within(self, kept: Tensor) -> Tensor:  # (S,)
        """The nearest fractions, in the norm weighted with the shares, that are allowed and use the budget."""
        low, high = -2.0, 2.0
        for _ in range(60):
            shift = (low + high) / 2
            used = float(((kept + shift).clamp(self.low, self.high) * self.share).sum())
            low, high = (shift, high) if used < self.keep else (low, shift)
        return (kept + high).clamp(self.low, self.high)


def _train(
    model: nn.Module, sites: Sequence[Site], batches: list[Tensor], bounds: _Bounds, training: Training,
    progress: Callable[[int, int], None],
) -> Tensor:  # (S,)  # fmt: skip
    """The kept fractions with the smallest loss, each loss taken over the last steps, as many as there are batches."""
    if not batches or min(batch.shape[1] for batch in batches) < 2:
        raise ValueError("learned ranks need calibration batches of at least two tokens")
    kept = bounds.within(torch.full_like(bounds.share, bounds.keep)).requires_grad_()  # (S,)
    optimizer = torch.optim.Adam([kept])
    order = torch.Generator().manual_seed(training.seed)
    best, lowest, recent = kept.detach().clone(), float("inf"), []
    queue: list[int] = []
    with torch.enable_grad(), _truncating(model, sites, training.sharpness) as positions:
        for step in range(training.steps):
            queue = queue or torch.randperm(len(batches), generator=order).tolist()
            positions[:] = (kept * bounds.positions).unbind()
            loss = _loss(model, batches[queue.pop()].to(kept.device))
            if not isfinite(loss.item()):
                raise ValueError(f"learned ranks: the loss is {loss.item()} at step {step}, so nothing can be learned")
            recent = [*recent, loss.item()][-len(batches) :]
            if len(recent) == len(batches) and sum(recent) < lowest:
                best, lowest = kept.detach().clone(), sum(recent)
            optimizer.zero_grad()
            loss.backward()
            assert kept.grad is not None
            kept.grad = kept.grad / bounds.share - kept.grad.sum()  # per cost, less what all have in common
            optimizer.param_groups[0]["lr"] = training.learning_rate * (1 + cos(pi * step / training.steps)) / 2
            optimizer.step()
            with torch.no_grad():
                kept.copy_(bounds.within(kept))
            progress(step + 1, training.steps)
    return best


def _loss(model: nn.Module, ids: Tensor) -> Tensor:  # (B, T)
    out: Any = model(ids, use_cache=False)
    logits = out.logits if hasattr(out, "logits") else out
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@contextmanager
def _truncating(model: nn.Module, sites: Sequence[Site], sharpness: float) -> Iterator[list[Tensor]]:
    """While open, the outputs of the sites are truncated at the positions in the list, and nothing else is trained."""
    positions = [torch.ones(()) for _ in sites]
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}

    def truncate(place: int, site: Site) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:  # (B, T, O)
            bias = 0 if site.bias is None else site.bias
            matrix = (out - bias).to(torch.promote_types(out.dtype, torch.float32))
            count = min(matrix.shape[-2], site.in_features, site.out_features)
            return soft_truncation(matrix, positions[place] * count, sharpness).to(out.dtype) + bias

        return hook

    handles = [site.module.register_forward_hook(truncate(place, site)) for place, site in enumerate(sites)]
    try:
        model.eval().requires_grad_(False)
        yield positions
    finally:
        for handle in handles:
            handle.remove()
        for parameter, need in needed.items():
            parameter.requires_grad_(need)
        for module, mode in modes.items():
            module.training = mode


def _linear_sites(model: nn.Module, names: Sequence[str]) -> list[Site]:
    found = {site.name: site for site in find_sites(model)}
    for name in names:
        if name not in found or found[name].kind != "linear":
            what = "no site that is still dense" if name not in found else f"a site of the kind {found[name].kind!r}"
            raise ValueError(f"learned ranks are for linear layers, and {name} is {what}")
    if not names:
        raise ValueError("learned ranks: there are no sites")
    return [found[name] for name in dict.fromkeys(names)]


def _sizes(site: Site, storage: Storage) -> Sizes:
    """Raises ValueError if rank 1 costs as much as the dense weight."""
    both = site.in_features, site.out_features
    dense, per_rank = both[0] * both[1], max(both) if storage == "remapped" else sum(both)
    largest = min((dense - 1) // per_rank, *both)
    if largest < 1:
        raise ValueError(f"learned ranks: {site.name} is {both[0]}x{both[1]}, too small for a rank; leave it out")
    return Sizes(dense, per_rank, largest, min(both))


def _budget(sizes: Mapping[str, Sizes], keep: float) -> int:
    dense, least = (sum(getattr(s, what) for s in sizes.values()) for what in ("dense", "per_rank"))
    budget = floor(keep * _UNROUND * dense)
    if not least <= budget <= dense:
        smallest = ceil(least / dense * 1e4) / 1e4
        raise ValueError(f"learned ranks: keep={keep} cannot be met: it must be from {smallest} (rank 1 each) to 1")
    return min(budget, sum(s.per_rank * s.largest for s in sizes.values()))


def _whole_ranks(wanted: Mapping[str, float], sizes: Mapping[str, Sizes], budget: int) -> dict[str, int]:
    """The ranks rounded down; what that leaves of the budget goes to those that were rounded down most."""
    ranks = {name: min(max(floor(rank + 1e-6), 1), sizes[name].largest) for name, rank in wanted.items()}
    room = budget - sum(sizes[name].per_rank * rank for name, rank in ranks.items())
    for name in sorted(ranks, key=lambda name: ranks[name] - wanted[name]):
        if sizes[name].per_rank <= room and ranks[name] < sizes[name].largest:
            ranks[name] += 1
            room -= sizes[name].per_rank
    assert room >= 0
    return ranks
