"""Stacks of experts owe what single operators owe, one expert at a time; the mixture is checked against its sum."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relative import assert_relative
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tensormix.operators import (
    OPERATORS,
    Bypass,
    DenseStack,
    Experts,
    ExpertStack,
    LowRank,
    StackedLinear,
    Sum,
    Zero,
    build,
)
from tensormix.sites import macs_per_token

E, I, O = 3, 12, 20


def dense(transposed=False):
    stack = DenseStack(E, I, O, transposed=transposed)
    nn.init.normal_(stack.stack)
    return stack


def low_ranks(rank=2):
    return [LowRank.from_dense(torch.randn(O, I), rank=rank) for _ in range(E)]


CASES = {
    "dense": lambda: dense(),
    "dense_transposed": lambda: dense(transposed=True),
    "low_rank": lambda: ExpertStack.from_experts(low_ranks()),
    "zero": lambda: ExpertStack.from_experts([Zero(I, O) for _ in range(E)]),
    "sum": lambda: ExpertStack.from_experts([Sum(terms=low_ranks()[:2]) for _ in range(E)]),
}


@pytest.fixture(params=CASES)
def stack(request):
    torch.manual_seed(0)
    return CASES[request.param]()


def test_every_stack_has_a_case():
    covered = {type(make()) for make in CASES.values()}
    assert covered == {cls for cls in OPERATORS.values() if issubclass(cls, StackedLinear)}


def test_every_expert_multiplies_by_its_own_matrix(stack):
    stack, x = stack.double(), torch.randn(4, 5, I, dtype=torch.float64)
    weight = stack.to_dense()
    assert weight.shape == (E, O, I)
    for expert in range(E):
        assert_relative(stack(x, expert), x @ weight[expert].T, 1e-14, f"expert {expert}")
        assert torch.equal(stack.expert_dense(expert), weight[expert])


def test_gradients_are_the_dense_gradients(stack):
    stack, x = stack.double(), torch.randn(5, I, dtype=torch.float64)
    wanted = dict(stack.named_parameters())
    if not wanted:
        assert not stack(x, 1).requires_grad
        return
    for expert in range(E):
        options = {"allow_unused": True, "materialize_grads": True}
        dy = torch.randn(5, O, dtype=torch.float64)
        outputs = stack(x, expert), x @ stack.expert_dense(expert).T
        fast, slow = (torch.autograd.grad(y, list(wanted.values()), dy, **options) for y in outputs)
        for name, a, b in zip(wanted, fast, slow, strict=True):
            assert_relative(a, b, 1e-13, f"gradient of {name}")


def test_spec_survives_json_and_rebuilds_it(stack):
    spec = json.loads(json.dumps(stack.spec))
    assert spec == stack.spec
    twin = build(spec)
    twin.load_state_dict(stack.state_dict())
    assert torch.equal(twin.to_dense(), stack.to_dense()) and twin.spec == stack.spec


def test_builds_on_meta(stack):
    with torch.device("meta"):
        twin = build(stack.spec)
    assert {t.device.type for t in twin.state_dict().values()} == {"meta"}
    assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in stack.state_dict().items()}
    assert (twin.num_params, twin.macs_per_token) == (stack.num_params, stack.macs_per_token)


def test_costs_are_those_of_one_call_and_of_all_experts(stack):
    with FlopCounterMode(display=False) as counter:
        stack(torch.randn(7, I), 1)
    assert counter.get_total_flops() == 2 * 7 * stack.macs_per_token
    count = sum(p.numel() for p in stack.parameters())
    stack.bias = nn.Parameter(torch.zeros(E, O))
    assert stack.num_params == count


def test_every_expert_adds_its_own_bias(stack):
    x, bias = torch.randn(5, I), torch.randn(E, O)
    plain = [stack(x, expert) for expert in range(E)]
    stack.bias = nn.Parameter(bias)
    for expert in range(E):
        assert torch.equal(stack(x, expert), plain[expert] + bias[expert])


def test_known_counts():
    assert (dense().num_params, dense().macs_per_token) == (E * O * I, O * I)
    stack = ExpertStack.from_experts(low_ranks(rank=2))
    assert (stack.num_params, stack.macs_per_token) == (E * 2 * (I + O), 2 * (I + O))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_dense_stack_lies_around_the_parameter_it_is_given(transposed):
    stored = nn.Parameter(torch.randn(E, I, O) if transposed else torch.randn(E, O, I))
    stack = DenseStack.around(stored, transposed=transposed)
    assert stack.stack is stored and stack.weight.data_ptr() == stored.data_ptr()
    assert (stack.num_experts, stack.in_features, stack.out_features) == (E, I, O)
    assert torch.equal(stack.to_dense(), stored.mT if transposed else stored)


def test_a_stack_holds_the_very_operators_it_is_made_of():
    experts = low_ranks()
    stack = ExpertStack.from_experts(experts)
    assert all(stack.expert(number) is expert for number, expert in enumerate(experts))
    assert sorted(stack.state_dict()) == sorted(
        f"expert_{e}.{n}" for e in range(E) for n in ("left", "right", "weight")
    )


def test_an_empty_stack_has_parameters_of_its_own_for_every_expert():
    stack = build({"operator": "ExpertStack", "each": LowRank(I, O, rank=2).spec, "num_experts": E})
    assert len({p.data_ptr() for p in stack.parameters()}) == 2 * E


def test_biases_of_the_experts_become_rows():
    experts = low_ranks()
    experts[1].bias = nn.Parameter(torch.randn(O))
    wanted, x = torch.stack([torch.zeros(O), experts[1].bias, torch.zeros(O)]).detach(), torch.randn(4, I)
    outputs = [expert(x) for expert in experts]
    stack = ExpertStack.from_experts(experts)
    assert torch.equal(stack.bias, wanted) and stack.bias.is_leaf
    assert all(torch.equal(stack(x, number), y) for number, y in enumerate(outputs))
    assert not any("expert" in name for name in stack.state_dict() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DenseStack(0, 2, 2), r"DenseStack: num_experts, in_features .* must be at least 1, got 0, 2, 2"),
        (lambda: ExpertStack(each=Zero(2, 2), num_experts=0), r"ExpertStack: num_experts, .* got 0, 2, 2"),
        (lambda: ExpertStack(each=Bypass(), num_experts=2), r"each must be the operator of one expert.*not a Bypass"),
        (lambda: ExpertStack.from_experts([]), r"ExpertStack: needs the operator of one or more experts, got none"),
        (
            lambda: ExpertStack.from_experts([Zero(2, 2), Zero(2, 2), Zero(2, 3)]),
            r"expert 2 is .*'out_features': 3\}, but expert 0 is .*'out_features': 2\}",
        ),
        (lambda: build({"operator": "ExpertStack", "num_experts": 2}), r"ExpertStack: missing size each"),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


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
