"""How much one site matters: what the model loses when that site alone is compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.allocation.survey import Weigh, in_place
from tensormix.evaluate.divergence import divergences
from tensormix.evaluate.forward import quiet
from tensormix.sites import Site, blocks


def weigher(model: nn.Module, batches: Sequence[Tensor], measure: str) -> Weigh:  # batches of (B, T)
    """A function from a site and an operator to how much worse `model` is with that operator there.

    `measure` is "kl" (mean KL divergence from the dense model, nats per token), "loss" (rise of the mean negative
    log-likelihood, nats per token) or "angle" (of the site's block: the mean angle between the hidden states before
    and after it as a fraction of pi, arXiv 2403.17887; the operator is not looked at).

    Raises ValueError if there are no batches.
    """
    if not batches:
        raise ValueError("budget: sensitivity is measured on calibration text, and there is none")
    return {"kl": _by_kl, "loss": _by_loss, "angle": _by_angle}[measure](model, batches)


def _by_kl(model: nn.Module, batches: Sequence[Tensor]) -> Weigh:
    dense = _logits(model, batches)

    def weigh(site: Site, operator: nn.Module) -> float:
        with in_place(model, site, operator):
            pairs = zip(dense, _logits(model, batches), strict=True)
            return _mean(divergences(ours, theirs) for ours, theirs in pairs)

    return weigh


def _by_loss(model: nn.Module, batches: Sequence[Tensor]) -> Weigh:
    dense = _loss(model, batches)

    def weigh(site: Site, operator: nn.Module) -> float:
        with in_place(model, site, operator):
            return _loss(model, batches) - dense

    return weigh


def _by_angle(model: nn.Module, batches: Sequence[Tensor]) -> Weigh:
    angles: list[list[Tensor]] = [[] for _ in blocks(model)]

    def watcher(index: int) -> Callable[..., None]:
        def hook(_block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            cosines = F.cosine_similarity(before.double(), after.double(), dim=-1)
            angles[index].append((cosines.clamp(-1, 1).acos() / torch.pi).flatten())

        return hook

    handles = [
        block.register_forward_hook(watcher(index), with_kwargs=True) for index, block in enumerate(blocks(model))
    ]
    try:
        _logits(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    means = [_mean(of_block) for of_block in angles]
    return lambda site, operator: means[site.block or 0]


def _logits(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    device = next(model.parameters()).device
    with quiet(model):
        return [model(batch.to(device), use_cache=False).logits for batch in batches]


def _loss(model: nn.Module, batches: Sequence[Tensor]) -> float:
    return _mean(
        F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten().to(logits.device), reduction="none"
        )
        for logits, batch in zip(_logits(model, batches), batches, strict=True)
    )


def _mean(parts: Iterable[Tensor]) -> float:
    return float(torch.cat([part.flatten().double().cpu() for part in parts]).mean())
