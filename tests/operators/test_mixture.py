"""A mixture of experts is checked against its sum over the experts of each token."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tensormix.operators import (
    DenseStack,
    Experts,
)
from tensormix.sites import macs_per_token


class Shell(nn.Module):
    """The fused module that an `Experts` stands for, without weights."""

    def __init__(self, has_gate, has_post_expert_norm):
        super().__init__()
        self.has_gate, self.has_post_expert_norm = has_gate, has_post_expert_norm
        self.act_fn = nn.SiLU()
        if has_post_expert_norm:
            self.post_expert_norm = nn.RMSNorm(D)
            nn.init.normal_(self.post_expert_norm.weight)

    def _apply_gate(self, y):
        gate, up = y.chunk(2, dim=-1)
        return self.act_fn(gate) * up


D, H = 6, 10


def mixture(num_experts=4, has_gate=True, has_post_expert_norm=False, per_token=2):
    up = DenseStack(num_experts, D, H * (1 + has_gate))
    stacks = {"gate_up" if has_gate else "up": up, "down": DenseStack(num_experts, H, D, transposed=True)}
    for stack in stacks.values():
        nn.init.normal_(stack.stack)
        stack.bias = nn.Parameter(torch.randn(num_experts, stack.out_features))
    return Experts(Shell(has_gate, has_post_expert_norm), stacks, per_token).double()


@settings(deadline=None, max_examples=25)
@given(
    num_experts=st.integers(1, 5),
    per_token=st.integers(1, 3),
    num_tokens=st.integers(0, 6),
    has_gate=st.booleans(),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_mixture_is_the_weighted_sum_over_the_chosen_experts(
    num_experts, per_token, num_tokens, has_gate, norm, seed
):
    """Token by token, in the order of the router; the index num_experts is nobody."""
    torch.manual_seed(seed)
    experts = mixture(num_experts, has_gate, norm)
    hidden = torch.randn(num_tokens, D, dtype=torch.float64)
    index = torch.stack([torch.randperm(num_experts + 1)[:per_token] for _ in range(num_tokens)] or [torch.zeros(1)])
    index = index.long()[:num_tokens]
    weights = torch.rand(index.shape, dtype=torch.float64)
    up, down = experts.stacks.values()
    expected = torch.zeros_like(hidden)
    for token, row in enumerate(index.tolist()):
        for slot, expert in enumerate(row):
            if expert == num_experts:
                continue
            y = up.to_dense()[expert] @ hidden[token] + up.bias[expert]
            y = F.silu(y[:H]) * y[H:] if has_gate else F.silu(y)
            y = down.to_dense()[expert] @ y + down.bias[expert]
            y = F.rms_norm(y, (D,), experts.shell.post_expert_norm.weight) if norm else y
            expected[token] += weights[token, slot] * y
    torch.testing.assert_close(experts(hidden, index, weights), expected)


def test_hooks_see_each_expert_with_its_tokens():
    torch.manual_seed(0)
    experts, calls = mixture(), []
    hidden = torch.randn(7, D, dtype=torch.float64)
    index = torch.tensor([[0, 2], [2, 0], [2, 4], [0, 2], [2, 0], [4, 4], [0, 2]])  # 4 is nobody, 1 and 3 see no token
    weights = torch.rand(7, 2, dtype=torch.float64)
    handle = experts.stacks["gate_up"].register_forward_pre_hook(lambda _, args: calls.append(args))
    experts(hidden, index, weights)
    handle.remove()
    assert [expert for _, expert in calls] == [0, 2]
    assert torch.equal(calls[0][0], hidden[[0, 1, 3, 4, 6]])
    assert torch.equal(calls[1][0], hidden[[0, 1, 2, 3, 4, 6]])


def test_gradients_reach_the_tokens_the_router_and_the_experts():
    torch.manual_seed(0)
    experts = mixture()
    hidden = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    assert torch.autograd.gradcheck(lambda h, w: experts(h, index, w), (hidden, weights))
    experts(hidden, index, weights).sum().backward()
    seen = sorted(set(index.flatten().tolist()))
    assert all((experts.stacks["down"].stack.grad[e].norm() > 0) == (e in seen) for e in range(4))


def test_a_mixture_costs_what_its_tokens_visit():
    experts = mixture(per_token=2).float()
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    with FlopCounterMode(display=False) as counter:
        experts(torch.randn(9, D), index, torch.rand(9, 2))
    assert macs_per_token(experts) == 2 * (D * 2 * H + H * D)
    assert counter.get_total_flops() == 2 * 9 * macs_per_token(experts)


def test_the_shell_is_no_submodule_and_goes_along_with_a_copy():
    experts = mixture(has_post_expert_norm=True)
    assert not any(name.startswith("shell") for name, _ in experts.named_modules())
    assert "post_expert_norm.weight" in experts.state_dict()
    twin = copy.deepcopy(experts)
    assert twin.shell is not experts.shell and twin.shell.post_expert_norm is twin.get_submodule("post_expert_norm")
    routed = torch.randn(3, D, dtype=torch.float64), torch.zeros(3, 1).long(), torch.ones(3, 1, dtype=torch.float64)
    assert torch.equal(twin(*routed), experts(*routed))


def test_the_sum_of_weighted_outputs_keeps_the_dtype_of_the_tokens():
    experts = mixture().to(torch.bfloat16)
    out = experts(torch.randn(3, D, dtype=torch.bfloat16), torch.zeros(3, 1).long(), torch.rand(3, 1))
    assert out.dtype == torch.bfloat16
