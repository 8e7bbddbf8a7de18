"""Stacks of experts owe what single operators owe, one expert at a time."""

from __future__ import annotations

import json
from math import ceil

import pytest
import torch
from relative import assert_relative
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tensormix.operators import (
    OPERATORS,
    BasisExperts,
    Bypass,
    DenseStack,
    ExpertStack,
    LowRank,
    LowRankStack,
    StackedLinear,
    Sum,
    TuckerStack,
    Zero,
    build,
    stack_of,
)

E, I, O = 3, 12, 20


def dense(transposed=False):
    stack = DenseStack(E, I, O, transposed=transposed)
    nn.init.normal_(stack.stack)
    return stack


def low_ranks(rank=2):
    return [LowRank.from_dense(torch.randn(O, I), rank=rank) for _ in range(E)]


def filled(stack):
    """Every parameter is random."""
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    return stack


CASES = {
    "tucker": lambda: filled(TuckerStack(E, I, O, ranks=(E, 4, 3))),
    "tucker_mixed": lambda: filled(TuckerStack(E, I, O, ranks=(2, 4, 3))),
    "bases": lambda: filled(BasisExperts(E, I, O, num_bases=2, rank=3)),
    "bases_silu": lambda: filled(BasisExperts(E, I, O, num_bases=2, rank=3, activation="silu")),
    "bases_mirrored": lambda: filled(BasisExperts(E, I, O, num_bases=2, rank=3, activation="tanh", mirrored=True)),
    "dense": lambda: dense(),
    "dense_transposed": lambda: dense(transposed=True),
    "stacked": lambda: LowRankStack.from_experts(low_ranks()),
    "low_rank": lambda: ExpertStack.from_experts(low_ranks()),
    "own_ranks": lambda: ExpertStack.from_experts([*low_ranks(rank=2)[:1], *low_ranks(rank=3)[1:]]),
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
        for expert in range(E):
            stack(torch.randn(7, I), expert)
    assert ceil(counter.get_total_flops() / (2 * 7 * E)) == stack.macs_per_token
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


def test_low_rank_experts_of_one_rank_lie_in_one_tensor_for_each_factor():
    experts, x = low_ranks(rank=3), torch.randn(4, I)
    experts[1].bias = nn.Parameter(torch.randn(O))
    outputs = [expert(x) for expert in experts]
    stack = stack_of(experts)
    assert isinstance(stack, LowRankStack) and stack.left.shape == (E, 3, O) and stack.right.shape == (E, 3, I)
    apart = stack.one_by_one()
    assert isinstance(apart, ExpertStack) and apart.cost == ExpertStack.from_experts(experts).cost
    assert torch.equal(apart.to_dense(), stack_of(experts).to_dense()) and stack.num_params == apart.num_params
    for number, wanted in enumerate(outputs):
        assert_relative(stack(x, number), wanted, 1e-6, f"expert {number}")
        assert_relative(apart(x, number), wanted, 1e-6, f"expert {number}")


@pytest.mark.parametrize("name", ["own_ranks", "zero", "sum"])
def test_experts_of_other_kinds_or_ranks_stay_one_by_one(name):
    made = CASES[name]()
    assert isinstance(stack_of([made.expert(number) for number in range(E)]), ExpertStack)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DenseStack(0, 2, 2), r"DenseStack: num_experts, in_features .* must be at least 1, got 0, 2, 2"),
        (lambda: ExpertStack(each=Zero(2, 2), num_experts=0), r"ExpertStack: num_experts, .* got 0, 2, 2"),
        (lambda: LowRankStack(2, 3, 4, rank=4), r"LowRankStack: rank must be in 1..3, got 4"),
        (lambda: ExpertStack(each=Bypass(), num_experts=2), r"each must be the operator of one expert.*not a Bypass"),
        (lambda: ExpertStack.from_experts([]), r"ExpertStack: needs the operator of one or more experts, got none"),
        (
            lambda: ExpertStack.from_experts([Zero(2, 2), Zero(2, 2), Zero(2, 3)]),
            r"expert 2 is .*'out_features': 3\}, but expert 0 is .*'out_features': 2\}",
        ),
        (
            lambda: ExpertStack(each=[Zero(2, 2)], num_experts=2),
            r"needs the operator of each of 2 experts, got 1",
        ),
        (lambda: build({"operator": "ExpertStack", "num_experts": 2}), r"ExpertStack: missing size each"),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
