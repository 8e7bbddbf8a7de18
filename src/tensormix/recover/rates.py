"""Which parameters are trained, and how fast each of them moves.

A learning rate that suits Adam on a dense layer of I inputs falls like 1/I with the width (maximal update
parametrisation); the matrices of a structured layer have fewer inputs each, and with "fan_in" a rate that is larger by
in_features / fan-in (Qiu et al. 2024, arXiv 2406.06248, section 3.1). For MixT that factor is d^(N_T - 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from tensormix.sites import is_replacement


def compressed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all that took the place of dense weights, biases included."""
    return {parameter for module in model.modules() if is_replacement(module) for parameter in module.parameters()}


def rate_factors(model: nn.Module) -> dict[nn.Parameter, float]:
    """Of every matrix of an operator: in_features of the operator it belongs to, over its own number of inputs."""
    return {
        parameter: operator.in_features / parameter.shape[-1]
        for operator in cast(Iterator[Any], model.modules())
        if is_replacement(operator) and hasattr(operator, "in_features")
        for parameter in operator.parameters(recurse=False)
        if parameter is not getattr(operator, "bias", None) and parameter.dim() >= 2
    }


def parameter_groups(
    model: nn.Module, trained: set[nn.Parameter], learning_rate: float, core_rate: str
) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with its `lr`; the one with the plain rate comes first, where there is one."""
    factors = rate_factors(model) if core_rate == "fan_in" else {}
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in model.parameters():
        if parameter in trained:
            groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return [{"params": members, "lr": learning_rate * factor} for factor, members in groups.items() if members]
