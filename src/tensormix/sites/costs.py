"""What a model, or any part of it, costs: counted analytically, on meta too."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensormix.operators import Cost, Experts, Operator, bits_of
from tensormix.operators.packed import Packed
from tensormix.sites.families import is_conv1d
from tensormix.sites.fused_experts import dense_stack, experts_per_token, is_fused, stack_names


def cost_of(module: nn.Module, experts_per_token: int = 1) -> Cost:
    """The cost of an operator, of a block or of a whole model, with what is compressed in it and what is not.

    `experts_per_token` is for a stack of experts that is given alone; inside a model its router says it. Bytes per
    token are all but those of the experts that a token does not visit.
    """
    if isinstance(module, Operator):
        return module.cost.visiting(experts_per_token)
    bits = bits_of(module.state_dict())
    return Cost(num_parameters(module), bits, macs_per_token(module), bits // 8 - _idle_bytes(module))


def num_parameters(model: nn.Module) -> int:
    """Every parameter once, shared ones included once, and the numbers that quantised operators stand for."""
    packed = sum(part.num_codes for part in model.modules() if isinstance(part, Packed))
    return packed + sum(parameter.numel() for parameter in model.parameters())


def macs_per_token(model: nn.Module) -> int:
    """Multiply-accumulates for one token: linear layers, routers, operators, and the experts that a token visits."""
    total, inside = 0, set()
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, Operator):
            total += module.macs_per_token
        elif isinstance(module, Experts) or is_fused(module):
            total += sum(cost.macs for cost in _costs_of_stacks(module))
        else:
            if isinstance(module, nn.Linear) or is_conv1d(module) or _is_router(module):
                total += module.get_parameter("weight").numel()
            continue
        inside.update(module.modules())  # what it holds is in its own count
    return total


def _idle_bytes(model: nn.Module) -> int:
    """Of the experts that one token does not visit."""
    experts = [module for module in model.modules() if isinstance(module, Experts) or is_fused(module)]
    return sum(cost.bits // 8 - cost.bytes_per_token for module in experts for cost in _costs_of_stacks(module))


def _costs_of_stacks(experts: Any) -> list[Cost]:
    """Of both stacks of experts, opened or not, for a token at all experts that it visits."""
    if isinstance(experts, Experts):
        stacks, visits = list(experts.stacks.values()), experts.experts_per_token
    else:
        stacks, visits = [dense_stack(experts, name) for name in stack_names(experts)], experts_per_token(experts)
    return [stack.cost.visiting(visits) for stack in stacks]


def _is_router(module: nn.Module) -> bool:
    """Whether it is the router of transformers' mixtures of experts: a bare matrix with a row for each expert."""
    weight = module._parameters.get("weight")
    return weight is not None and hasattr(module, "top_k") and weight.shape[:1] == (getattr(module, "num_experts", 0),)
