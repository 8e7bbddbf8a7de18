"""Plans whose methods change the layers of a block together, and one that changes nothing but their orders."""

from __future__ import annotations

import torch

import tensormix.hf  # noqa: F401
from tensormix.methods import JointMethod
from tensormix.methods.neurons import dense, with_bias
from tensormix.plan import Plan
from tensormix.statistics import Gram, InputMean
from zoo import token_ids

BATCHES = [token_ids(rows=6, seed=seed) for seed in range(2)]
BOTH = Plan.model_validate(
    [
        {"blocks": "1", "method": {"name": "flat_llm", "keep": 0.7}},
        {"blocks": "2", "method": {"name": "narrow", "keep": 0.4, "width": 0.6}},
        {"blocks": "3", "method": {"name": "sola", "ranks": {"q": 5, "o": 6, "gate": 4, "up": 5, "down": 7}}},
    ]
)


class Same(JointMethod):
    """Changes nothing but the orders that it may: neurons, and channels inside the heads of values."""

    name: str = "same"
    needs = (Gram, InputMean)

    def needs_at(self, role):
        return {"k": (Gram,), "v": (InputMean,), "down": (Gram,)}.get(role, ())

    def empty(self, shapes, heads):
        return {role: dense(torch.empty(0), torch.empty(shape)) for role, shape in shapes.items()}

    def fit(self, layers, stats, heads):
        made = {}
        for role, layer in layers.items():
            weight, bias = layer.weight, layer.bias
            if role in ("gate", "up"):
                weight, bias = weight.flip(0), None if bias is None else bias.flip(0)
            if role == "v":
                weight = weight.unflatten(0, (heads.num_kv_heads, -1)).flip(1).flatten(0, 1)
                bias = None if bias is None else bias.view(heads.num_kv_heads, -1).flip(1).flatten()
            if role == "o":
                weight = weight.unflatten(1, (heads.num_heads, -1)).flip(2).flatten(1)
            if role == "down":
                weight = weight.flip(1)
            made[role] = with_bias(dense(weight, weight), bias)
        assert all(stats[role][kind].num_tokens for role, kind in (("k", Gram), ("v", InputMean), ("down", Gram)))
        assert stats["v"] is stats["k"] and "gate" not in stats
        return made
