"""Models with layers that read the same input, and the calls that they cost."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tensormix.compression import compress
from tensormix.plan import Plan
from zoo import make, token_ids

PLAN = Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}])
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


class Products(TorchDispatchMode):
    """Counts the calls of our kernels."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tensormix":
            self.calls[func.name().removeprefix("tensormix::")] += 1
        return func(*args, **(kwargs or {}))


def compressed(family, plan=PLAN):
    model = make(family)
    compress(model, plan)
    return model


@torch.no_grad()
def logits(model, seed=3, rows=2, length=12):
    return model(input_ids=token_ids(rows, length, seed), use_cache=False).logits
