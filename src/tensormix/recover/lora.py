"""Low-rank repair: compressed layers stay as they are, and a low-rank patch of each of them learns.

A patch is LoRA's B A (arXiv 2106.09685) with B = 0 at the start, so the model starts bit-equal. It stays, as a `Sum`,
except where the layer is itself W = left @ right: there the two factors are patched, first left and then right, and
the patches become part of them (the sequential update of SVD-LLM, arXiv 2403.07378), so that nothing grows.

Shape letters: I in_features, O out_features, R rank of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from tensormix.hf import attach, operators_of
from tensormix.operators import Chain, Dense, DenseStack, LowRank, StackedLinear, StructuredLinear, Sum
from tensormix.settings import Lora


class _Layer(NamedTuple):
    name: str
    operator: StructuredLinear  # as it was before
    patched: StructuredLinear  # what stands in its place
    patches: tuple[LowRank, ...]  # of the whole matrix, or of left and right


class Patches:
    """The patches of all compressed layers of `model`; making them puts them there.

    Raises:
        ValueError: no layer is compressed, or an expert stack is.
    """

    def __init__(self, model: Any, settings: Lora, seed: int) -> None:
        modules = {name: model.get_submodule(name) for name in operators_of(model)}
        stacks = [
            name
            for name, module in modules.items()
            if isinstance(module, StackedLinear) and not isinstance(module, DenseStack)
        ]
        if stacks:
            raise ValueError(
                f"recover: parameters 'lora' patches single matrices, and {stacks[0]} is a stack of experts; "
                "train it with parameters 'compressed'."
            )
        found = [(name, module) for name, module in modules.items() if isinstance(module, StructuredLinear)]
        if not found:
            raise ValueError("recover: parameters 'lora' needs a structured operator in the model; it has none.")
        self.model, self.settings = model, settings
        self._random = torch.Generator().manual_seed(seed)
        self.layers = [self._patch(name, operator) for name, operator in found]
        for layer in self.layers:
            self._put(layer.name, layer.operator, layer.patched)
        attach(model)  # checkpoints must name what is in them

    @property
    def parameters(self) -> set[nn.Parameter]:
        return {p for layer in self.layers for patch in layer.patches for p in (patch.left, patch.right)}

    @property
    def take_turns(self) -> bool:
        """Whether left factors learn in the first half of the steps and right ones in the second."""
        return any(len(layer.patches) == 2 for layer in self.layers)

    def _patch(self, name: str, operator: StructuredLinear) -> _Layer:
        if type(operator) is not LowRank:
            patch = self._beside(operator)
            return _Layer(name, operator, Sum(terms=[operator, patch]), (patch,))
        factors = [_around(operator.left), _around(operator.right)]
        patches = tuple(self._beside(factor) for factor in factors)
        sums = [Sum(terms=pair) for pair in zip(factors, patches, strict=True)]
        return _Layer(name, operator, Chain(factors=sums), patches)

    def _beside(self, operator: StructuredLinear) -> LowRank:  # (O, I)
        """alpha / R is part of `right`, drawn as LoRA draws it: a patch is two factors and nothing else."""
        I, O = operator.in_features, operator.out_features
        patch = LowRank(I, O, rank=min(self.settings.rank, I, O))
        with torch.no_grad():
            patch.left.zero_()
            patch.right.uniform_(-1, 1, generator=self._random).mul_(self.settings.scale / math.sqrt(I))
        return patch

    def _put(self, name: str, old: StructuredLinear, new: StructuredLinear) -> None:
        new.bias, old.bias = old.bias, None
        self.model.set_submodule(name, new.train(old.training).to(old.weight.device))

    @torch.no_grad()
    def merge(self) -> None:
        """Patches of factors become part of them; the others stay beside what they repair."""
        for layer in self.layers:
            if isinstance(layer.operator, LowRank):
                for factor, patch in zip((layer.operator.left, layer.operator.right), layer.patches, strict=True):
                    factor.add_(patch.to_dense())
                self._put(layer.name, layer.patched, layer.operator)
        attach(self.model)

    def remove(self) -> None:
        """The model is what it was."""
        for layer in self.layers:
            self._put(layer.name, layer.patched, layer.operator)
        attach(self.model)

    def optimizer(self, learning_rate: float, warmup: float, weight_decay: float, steps: int) -> tuple[Any, Any]:
        """AdamW and its schedule: a warm-up and a cosine to zero, of each half where the factors take turns.

        `right` is alpha / R times as large as LoRA's A and moves so much faster: Adam then makes the same steps.
        """
        pairs = [(patch.left, patch.right) for layer in self.layers for patch in layer.patches]
        left, right = map(list, zip(*pairs, strict=True))
        groups = [
            {"params": left, "lr": learning_rate},
            {"params": right, "lr": learning_rate * self.settings.scale},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        turn = first_turn(steps) if self.take_turns else steps

        def rate(step: int) -> float:
            done, length = (step, turn) if step < turn else (step - turn, steps - turn)
            rising = math.ceil(warmup * length)
            if done < rising:
                return done / rising
            return 0.5 * (1 + math.cos(math.pi * (done - rising) / max(1, length - rising)))

        return optimizer, LambdaLR(optimizer, rate)


class Turns(TrainerCallback):
    """Freezes the patches whose turn it is not: right ones first, then left ones."""

    def __init__(self, patches: Patches) -> None:
        self.pairs = [layer.patches for layer in patches.layers if len(layer.patches) == 2]

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        first = state.global_step < first_turn(state.max_steps)
        for left, right in self.pairs:
            left.requires_grad_(first)
            right.requires_grad_(not first)


def first_turn(steps: int) -> int:
    """How many of the steps belong to the left factors."""
    return steps - steps // 2


@contextmanager
def patched(model: Any, settings: Lora, seed: int) -> Iterator[Patches]:
    """Inside, the compressed layers of `model` are patched; afterwards merged, or as before if there was an error.

    Raises ValueError as `Patches` does.
    """
    patches = Patches(model, settings, seed)
    try:
        yield patches
    except BaseException:
        patches.remove()
        raise
    patches.merge()


def _around(matrix: nn.Parameter) -> Dense:  # (O, I)
    """The operator that holds this very parameter."""
    O, I = matrix.shape
    with torch.device("meta"):
        dense = Dense(I, O)
    dense.matrix, dense.weight = matrix, matrix.new_empty(0)
    return dense
