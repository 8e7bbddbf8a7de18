"""What a recovery trains, and by which optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tensormix.recover.lora import Patches
from tensormix.recover.rates import compressed_parameters, parameter_groups
from tensormix.recover.zeroth_order import ZerothOrderDescent
from tensormix.settings import Recover


def trained_parameters(model: Any, settings: Recover, patches: Patches | None) -> set[nn.Parameter]:
    """Raises ValueError if compressed layers are to be trained and there are none."""
    if patches is not None:
        return patches.parameters
    trained = set(model.parameters()) if settings.parameters == "all" else compressed_parameters(model)
    if not trained:
        raise ValueError("recover: parameters 'compressed' needs a structured operator in the model; it has none.")
    return trained


def optimizer_of(
    model: Any, settings: Recover, trained: set[nn.Parameter], patches: Patches | None, rate: float, seed: int
) -> tuple[Any, Any]:
    """With its schedule; None where the Trainer's own are meant."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if settings.gradient == "zeroth_order":
            return ZerothOrderDescent(groups, rate, settings.weight_decay, settings.zeroth_order, seed)
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)

    if patches is not None:
        optimizer = make(patches.groups(rate))
        return optimizer, patches.schedule(optimizer, settings.warmup, settings.steps, settings.schedule)
    if settings.core_rate == "same" and settings.gradient == "exact":
        return None, None
    return make(parameter_groups(model, trained, rate, settings.core_rate)), None
