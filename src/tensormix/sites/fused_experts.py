"""How transformers fuses the experts of a block into one module, and how that comes apart and together again.

Shape letters: E experts, O out_features, I in_features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tensormix.operators import DenseStack, Experts, StackedLinear
from tensormix.sites.families import EXPERT_WEIGHTS, EXPERTS_PER_TOKEN

_FLAGS = ("num_experts", "config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_fused(module: nn.Module) -> bool:
    """Whether it holds the weights of all experts of a block and is run by transformers' experts implementations."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    expected = {EXPERT_WEIGHTS[name] for name in stack_names(module)}
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    own = dict(module.named_parameters(recurse=False))
    # Packed and scaled experts (fp8, mxfp4) do not hold plain matrices.
    return own.keys() == expected and not module._buffers and all(p.dtype in _FLOATS for p in own.values())


def stack_names(fused: Any) -> tuple[str, str]:
    """The stack into the experts and the one out of them."""
    return ("gate_up" if fused.has_gate else "up", "down")


def dense_stack(fused: Any, name: str) -> DenseStack:
    """The stack `name` around the parameters of a fused module, which holds them on: nothing is copied."""
    stack = DenseStack.around(fused.get_parameter(EXPERT_WEIGHTS[name]), transposed=fused.is_transposed)
    if fused.has_bias:
        stack.bias = fused.get_parameter(f"{EXPERT_WEIGHTS[name]}_bias")
    return stack


def experts_per_token(fused: Any) -> int:
    """How many experts the router chooses for a token, as the model's config has it.

    Raises ValueError if the config does not say it in one number.
    """
    found = [getattr(fused.config, key, None) for key in EXPERTS_PER_TOKEN]
    number = next((value for value in found if isinstance(value, int)), None)
    if number is None:
        raise ValueError(
            f"{type(fused.config).__name__} does not say how many experts a token visits: "
            f"none of {', '.join(EXPERTS_PER_TOKEN)} is a number"
        )
    return number


def open_experts(model: nn.Module, name: str) -> Experts:
    """Replace the fused experts at `name` by an `Experts` with two dense stacks, around the same parameters.

    Raises ValueError if there are no fused experts at `name`.
    """
    fused: Any = model.get_submodule(name)
    if not is_fused(fused):
        raise ValueError(f"{name} is a {type(fused).__name__}, not the fused experts of a block: it cannot be opened")
    shell = copy.copy(fused)
    shell._parameters = {}
    stacks: dict[str, StackedLinear] = {stack: dense_stack(fused, stack) for stack in stack_names(fused)}
    experts = Experts(shell, stacks, experts_per_token(fused))
    for stack in stacks:
        # Saved in place of the weights that a loader without this package expects: it stops at the mismatch, where it
        # would else draw random experts. One expert of no size, because transformers splits and merges them per expert.
        stored = fused.get_parameter(EXPERT_WEIGHTS[stack])
        # A parameter, because some of its conversions ask the model for it.
        empty = torch.empty(1, 0, 0, dtype=stored.dtype, device=stored.device)
        experts.register_parameter(EXPERT_WEIGHTS[stack], nn.Parameter(empty, requires_grad=False))
    model.set_submodule(name, experts.train(fused.training))
    return experts


def close_experts(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Replace the opened experts at `name` by the fused module; dense stacks keep their parameters.

    Raises ValueError if a stack has a bias that the architecture has no place for.
    """
    experts: Any = model.get_submodule(name)
    fused = copy.copy(experts.shell)
    fused._parameters = {}
    for stack_name, stack in experts.stacks.items():
        fused.register_parameter(EXPERT_WEIGHTS[stack_name], _merged(stack, fused.is_transposed, dtype))
        if fused.has_bias:
            fused.register_parameter(f"{EXPERT_WEIGHTS[stack_name]}_bias", nn.Parameter(stack.bias.detach().to(dtype)))
        elif stack.bias is not None:
            raise ValueError(
                f"{name}.{stack_name} holds constant outputs, but the architecture has no bias there: "
                "this model has no dense form"
            )
    model.set_submodule(name, fused.train(experts.training))


def _merged(stack: StackedLinear, transposed: bool, dtype: torch.dtype | None) -> nn.Parameter:
    """All experts in one parameter, (E, O, I) or (E, I, O); filled one by one, so that only one is there twice."""
    if isinstance(stack, DenseStack) and stack.transposed == transposed and dtype in (None, stack.stack.dtype):
        return stack.stack
    first = stack.expert_dense(0).detach().to(dtype)  # (O, I)
    shape = (stack.num_experts, *(first.T if transposed else first).shape)
    dense = DenseStack.around(nn.Parameter(first.new_empty(shape)), transposed=transposed)
    with torch.no_grad():
        for expert in range(stack.num_experts):
            dense.weight[expert].copy_(stack.expert_dense(expert))
    return dense.stack
