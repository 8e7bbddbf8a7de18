"""Inputs of a layer whose directions differ in size, and the statistics that methods of rounding ask of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormix.methods.base import Statistics
from tensormix.statistics import Gram, HeldOutGram


def correlated(num_tokens: int, size: int, decades: float, seed: int = 0, mixing: int = 99) -> Tensor:  # (N, I)
    """Some directions are smaller than others by this many powers of ten; `mixing` says which."""
    generator = torch.Generator().manual_seed(mixing)
    maps = torch.randn(size, size, generator=generator) * torch.logspace(0, -decades, size)
    return torch.randn(num_tokens, size, generator=torch.Generator().manual_seed(seed)) @ maps.T


def seen(x: Tensor) -> Statistics:  # (N, I)
    stats = {kind: kind(x.shape[1]) for kind in (Gram, HeldOutGram)}
    for statistic in stats.values():
        statistic.update(x)
    return stats


@torch.no_grad()
def error(op: torch.nn.Module, of: Tensor, x: Tensor) -> float:  # (O, I), (N, I)
    """What the outputs miss, relative to them."""
    return float((x @ (op.to_dense() - of).T).norm() / (x @ of.T).norm())
