"""Repair by patches: compressed layers stay as they are, and a small operator beside each of them learns.

A patch begins as exactly nothing, so the model starts bit-equal. It stays, as a `Sum`, except where the layer is itself
W = left @ right: there the two factors are patched, first left and then right, and the patches become part of them (the
sequential update of SVD-LLM, arXiv 2403.07378), so that nothing grows. Patches of dense matrices can become part of
those.

Shape letters: I in_features, O out_features.
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
from tensormix.operators import Chain, Dense, ExpertStack, LowRank, LowRankStack, StructuredLinear, Sum
from tensormix.recover.patches import Patch, make_patch
from tensormix.settings import Lora
from tensormix.sites import Site, find_sites


class _Layer(NamedTuple):
    name: str
    module: nn.Module  # as it was before: an operator, or what is dense
    patched: StructuredLinear  # what stands in its place
    patches: tuple[Patch, ...]  # of the whole matrix, or of left and right


class Patches:
    """The patches of the layers of `model` that `settings` means; making them puts them there.

    Raises:
        ValueError: no layer is compressed where those are meant, an expert stack is, or patches are to be merged into
            what is not dense.
    """

    def __init__(self, model: Any, settings: Lora, seed: int) -> None:
        self.model, self.settings = model, settings
        self._random = torch.Generator().manual_seed(seed)
        self._dense: dict[str, nn.Parameter] = {}  # (O, I), of layers that are not operators
        self.layers = [self._patch(name, module) for name, module in self._found()]
        for layer in self.layers:
            self._put(layer.name, layer.module, layer.patched)
        attach(model)  # checkpoints must name what is in them

    def _found(self) -> list[tuple[str, nn.Module]]:
        modules = {name: self.model.get_submodule(name) for name in operators_of(self.model)}
        stacks = [name for name, module in modules.items() if isinstance(module, ExpertStack | LowRankStack)]
        if stacks:
            raise ValueError(
                f"recover: parameters 'lora' patches single matrices, and {stacks[0]} is a stack of experts; "
                "train it with parameters 'compressed'."
            )
        found: list[tuple[str, nn.Module]] = [
            (name, module) for name, module in modules.items() if isinstance(module, StructuredLinear)
        ]
        if self.settings.layers == "all":
            sites = {site.name: site for site in find_sites(self.model) if site.kind == "linear"}
            self._dense = {name: _parameter(site) for name, site in sites.items()}
            found += [(name, site.module) for name, site in sites.items()]
        if not found:
            raise ValueError(
                "recover: parameters 'lora' needs a structured operator in the model; it has none. "
                "With lora: {layers: all} it patches dense layers."
            )
        if self.settings.merge:
            self._check_mergeable(found)
        return found

    def _check_mergeable(self, found: list[tuple[str, nn.Module]]) -> None:
        for name, module in found:
            if isinstance(module, StructuredLinear) and type(module) is not Dense and not self._by_factors(module):
                factors = ", or leave low_rank_layers: factors" if isinstance(module, LowRank) else ""
                raise ValueError(
                    f"recover: lora: merge needs a dense matrix in every layer, and {name} is a "
                    f"{type(module).__name__}; leave out merge, and patches stay beside their layers{factors}."
                )

    def _by_factors(self, module: nn.Module) -> bool:
        return type(module) is LowRank and self.settings.low_rank_layers == "factors"

    @property
    def parameters(self) -> set[nn.Parameter]:
        return {p for layer in self.layers for patch in layer.patches for p in patch.operator.parameters()}

    @property
    def take_turns(self) -> bool:
        """Whether left factors learn in the first half of the steps and right ones in the second."""
        return any(len(layer.patches) == 2 for layer in self.layers)

    def _patch(self, name: str, module: nn.Module) -> _Layer:
        if isinstance(module, LowRank) and self._by_factors(module):
            factors = [_around(module.left), _around(module.right)]
            patches = tuple(self._beside(factor) for factor in factors)
            sums = [Sum(terms=[f, p.operator]) for f, p in zip(factors, patches, strict=True)]
            return _Layer(name, module, Chain(factors=sums), patches)
        operator = module if isinstance(module, StructuredLinear) else _around(self._dense[name])
        patch = self._beside(operator)
        return _Layer(name, module, Sum(terms=[operator, patch.operator]), (patch,))

    def _beside(self, operator: StructuredLinear) -> Patch:
        return make_patch(operator.in_features, operator.out_features, self.settings, self._random)

    def _put(self, name: str, old: Any, new: Any) -> None:
        new.bias, old.bias = old.bias, None
        self.model.set_submodule(name, new.train(old.training).to(old.weight.device))

    @torch.no_grad()
    def merge(self) -> None:
        """Patches of factors become part of them, those of dense matrices where that is asked for; the others stay."""
        for layer in self.layers:
            if isinstance(layer.module, LowRank) and self._by_factors(layer.module):
                matrices = [layer.module.left, layer.module.right]
            elif self.settings.merge:
                matrices = [layer.module.matrix if isinstance(layer.module, Dense) else self._dense[layer.name]]
            else:
                layer.patched.requires_grad_(True)  # as all there is, unless it was told otherwise before
                continue
            for matrix, patch in zip(matrices, layer.patches, strict=True):
                matrix.add_(patch.operator.to_dense())
            self._put(layer.name, layer.patched, layer.module)
        attach(self.model)

    def remove(self) -> None:
        """The model is what it was."""
        for layer in self.layers:
            self._put(layer.name, layer.patched, layer.module)
        attach(self.model)

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """For an optimizer. A matrix that is alpha / rank times as large as the papers' moves so much faster: Adam then
        makes the same steps."""
        patches = [patch for layer in self.layers for patch in layer.patches]
        return [
            {"params": [parameter for patch in patches for parameter in patch.others], "lr": learning_rate},
            {"params": [patch.scaled for patch in patches], "lr": learning_rate * self.settings.scale},
        ]

    def schedule(self, optimizer: torch.optim.Optimizer, warmup: float, steps: int, falling: str) -> LambdaLR:
        """Of each half where the factors take turns: a warm-up, and then a cosine to zero or a constant."""
        turn = first_turn(steps) if self.take_turns else steps

        def rate(step: int) -> float:
            done, length = (step, turn) if step < turn else (step - turn, steps - turn)
            rising = math.ceil(warmup * length)
            if done < rising:
                return done / rising
            if falling == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * (done - rising) / max(1, length - rising)))

        return LambdaLR(optimizer, rate)


class Turns(TrainerCallback):
    """Freezes the patches whose turn it is not: right ones first, then left ones."""

    def __init__(self, patches: Patches) -> None:
        self.pairs = [layer.patches for layer in patches.layers if len(layer.patches) == 2]

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        first = state.global_step < first_turn(state.max_steps)
        for left, right in self.pairs:
            left.operator.requires_grad_(first)
            right.operator.requires_grad_(not first)


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


def _parameter(site: Site) -> nn.Parameter:  # (O, I)
    """The very parameter of a dense layer, or, where that is stored transposed, one on the same numbers."""
    own = site.module.get_parameter("weight")
    return own if own.shape == site.weight.shape and own.stride() == site.weight.stride() else nn.Parameter(site.weight)


def _around(matrix: nn.Parameter) -> Dense:  # (O, I)
    """The operator that holds this very parameter."""
    O, I = matrix.shape
    with torch.device("meta"):
        dense = Dense(I, O)
    dense.matrix, dense.weight = matrix, matrix.new_empty(0)
    return dense
