"""How much one site matters: what the model loses when that site alone is compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.allocation.rises import Rise, Rises, first_tokens
from tensormix.allocation.survey import Weigh, in_place
from tensormix.evaluate.forward import quiet
from tensormix.sites import Site, blocks


def weigher(model: nn.Module, batches: Sequence[Tensor], measure: str, tokens: int) -> Weigh:  # batches of (B, T)
    """A function from a site and an operator to how much worse `model` is with that operator there, on `tokens` tokens.

    It runs from the block of the site on: what the dense model feeds each block is held.

    `measure` is "kl" (mean KL divergence from the dense model, nats per token), "loss" (rise of the mean negative
    log-likelihood, nats per token) or "angle" (of the site's block: the mean angle between the hidden states before
    and after it as a fraction of pi, arXiv 2403.17887; the operator is not looked at).

    Raises ValueError if there are no batches.
    """
    if not batches:
        raise ValueError("budget: sensitivity is measured on calibration text, and there is none")
    if measure == "angle":
        return _by_angle(model, batches)
    rises = Rises(model, first_tokens(batches, tokens), measure)

    def weigh(site: Site, operator: nn.Module) -> Rise:
        with in_place(model, site, operator):
            return rises.at(site.block or 0)

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
        with quiet(model):
            for batch in batches:
                model(batch.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    means = [Rise.over(of_block) for of_block in angles]
    return lambda site, operator: means[site.block or 0]
