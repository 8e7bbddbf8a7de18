"""Steps without gradients: the loss on both sides of where the parameters are, along random directions.

For a query a direction z is drawn from a normal distribution, and c = (L(w + e z) - L(w - e z)) / 2 e is how steep the
loss is along it. The mean of c z over queries is an estimate of the gradient: its expectation is the gradient of the
smoothed loss, and of a quadratic loss the gradient itself. Its squared error is (n + 1) / Q times the squared gradient
for n numbers and Q queries, which is why few numbers should be trained so: patches.

A direction is never kept: its seed is, and it is drawn again each time it is needed (MeZO, arXiv 2305.17333). So a step
takes the memory of a forward pass, and depends on nothing but the seed of the run, its number, and the text.
AdaZeta (arXiv 2406.18060) trains tensor-train adapters so, with more queries the further it gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.settings import ZerothOrder


def num_queries(settings: ZerothOrder, step: int) -> int:
    """How many directions are asked at this step, counted from 0."""
    grown = int(settings.queries * (step + 1) ** settings.growth)
    return grown if settings.most_queries is None else min(grown, settings.most_queries)


class ZerothOrderDescent(torch.optim.Optimizer):
    """Descends along estimates of the gradient. Where the rate of a group is a multiple of `learning_rate`, so is the
    perturbation: the group is then estimated in units of its own.

    Args:
        groups: each with `params` and its own `lr`; parameters that require no gradient at a step are left alone.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        weight_decay: float,
        settings: ZerothOrder,
        seed: int,
    ) -> None:
        units = [{**group, "unit": group["lr"] / learning_rate} for group in groups]
        super().__init__(units, {"weight_decay": weight_decay})
        self.settings, self.seed = settings, seed
        self._found: list[tuple[int, float]] = []  # the seeds of the directions of this step, and their shares

    @torch.no_grad()
    def ask(self, loss: Callable[[], Tensor], step: int) -> Tensor:
        """Estimate the gradient of `loss`, which is called twice for each query, and add it to that of this step.

        The parameters are where they were, but for rounding. Returns the mean of all losses.
        """
        number, size = num_queries(self.settings, step), self.settings.perturbation
        begun, losses = len(self._found), []
        for query in range(number):
            seed = _seed(self.seed, step, begun + query)
            self._move(seed, size)
            ahead = loss()
            self._move(seed, -2 * size)
            behind = loss()
            self._move(seed, size)
            self._found.append((seed, float(ahead - behind) / (2 * size * number)))
            losses += [ahead, behind]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Against the estimate that `ask` made of this step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["weight_decay"] and parameter.requires_grad:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for seed, steepness in self._found:
            for group, parameter, direction in self._directions(seed):
                parameter.add_(direction, alpha=-group["lr"] * steepness)
        self._found.clear()

    def _move(self, seed: int, distance: float) -> None:
        for group, parameter, direction in self._directions(seed):
            parameter.add_(direction, alpha=distance * group["unit"])

    def _directions(self, seed: int) -> Iterator[tuple[dict[str, Any], nn.Parameter, Tensor]]:
        """One after the other, so that one direction is there at a time."""
        for place, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                if parameter.requires_grad:
                    random = torch.Generator(parameter.device).manual_seed(_seed(seed, place, number))
                    yield group, parameter, torch.randn(parameter.shape, generator=random, device=parameter.device)


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")
