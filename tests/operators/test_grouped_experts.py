"""The experts of a block in grouped products give what one expert at a time gives, in one graph for every routing."""

from __future__ import annotations

import pytest
import torch
from test_mixture import Shell
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tensormix.kernels.grouped import grouped, multiplies
from tensormix.operators import (
    BasisExperts,
    DenseStack,
    Experts,
    ExpertStack,
    LowRank,
    LowRankStack,
    Quantized,
    StackedLinear,
    TuckerStack,
)

E, D, H, N, K = 5, 8, 16, 9, 2

# (I, O) -> a stack. Ranks are odd where a stack allows it: then rows do not fill 16 bytes.
CASES = {
    "dense": lambda I, O: DenseStack(E, I, O),
    "dense_transposed": lambda I, O: DenseStack(E, I, O, transposed=True),
    "low_rank": lambda I, O: LowRankStack(E, I, O, rank=3),
    "tucker": lambda I, O: TuckerStack(E, I, O, ranks=(E, 8, 4)),
    "tucker_odd": lambda I, O: TuckerStack(E, I, O, ranks=(E, 3, 5)),
    "tucker_mixed": lambda I, O: TuckerStack(E, I, O, ranks=(2, 3, 5)),
    "bases": lambda I, O: BasisExperts(E, I, O, num_bases=2, rank=4, activation="silu"),
    "bases_odd": lambda I, O: BasisExperts(E, I, O, num_bases=3, rank=5),
    "bases_mirrored": lambda I, O: BasisExperts(E, I, O, num_bases=2, rank=4, activation="tanh", mirrored=True),
}
ROUTINGS = ["random", "one_expert", "nobody"]


def experts_of(name, *, bias=True, norm=False, dtype=torch.float32, seed=0) -> Experts:
    torch.manual_seed(seed)
    stacks = {"gate_up": CASES[name](D, 2 * H), "down": CASES[name](H, D)}
    for stack in stacks.values():
        if bias:
            stack.bias = nn.Parameter(torch.empty(E, stack.out_features))
    made = Experts(Shell(True, norm), stacks, K)
    if norm:
        made.post_expert_norm = nn.RMSNorm(D)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.to(dtype)


def routed(routing="random", num_tokens=N, dtype=torch.float32):
    """Hidden states, the experts of each token, their weights."""
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(num_tokens)])
    if routing == "one_expert":  # and all others idle
        index = torch.full_like(index, 3)
    if routing == "nobody":  # is the index E
        index[::2, 0], index[1:2] = E, E
    return torch.randn(num_tokens, D, dtype=dtype), index, torch.rand(num_tokens, K, dtype=dtype)


def both_ways(experts, *inputs):
    """One expert at a time, and grouped."""
    ways = []
    for grouped_form in (False, True):
        experts._is_grouped = lambda *_, answer=grouped_form: answer
        ways.append(experts(*inputs))
    del experts._is_grouped
    return ways


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_tokens", [1, 2, N])
@pytest.mark.parametrize("name", CASES)
def test_grouped_is_one_by_one_with_its_gradients(name, num_tokens, routing):
    """In fp64, with few rows and many; also where nobody gets a token."""
    norm, dtype = routing == "random", torch.float64
    experts = experts_of(name, norm=norm, dtype=dtype)
    hidden, index, weights = routed(routing, num_tokens, dtype)
    wanted = [hidden.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    slow, fast = both_ways(experts, hidden, index, weights)
    torch.testing.assert_close(fast, slow)
    dy = torch.randn_like(slow)
    options = {"allow_unused": True, "materialize_grads": True}
    for a, b in zip(*(torch.autograd.grad(y, wanted, dy, **options) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_grouped_is_one_by_one_in_every_dtype(name, dtype):
    experts, inputs = experts_of(name, bias=False, dtype=dtype), routed("nobody", dtype=dtype)
    with torch.no_grad():
        slow, fast = both_ways(experts, *inputs)
    assert fast.dtype == dtype
    scale = float(slow.abs().max())
    torch.testing.assert_close(fast, slow, rtol=0, atol=32 * torch.finfo(dtype).eps * scale)


def test_second_derivatives():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 3, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    inputs, ends = (x.requires_grad_(), weight.requires_grad_()), torch.tensor([2, 2, 6, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, w: grouped(x, w, ends), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w: grouped(x, w, ends), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [5, 8])
def test_a_graph_is_told_what_the_product_gives(width, dtype):
    """Shapes, strides and gradients."""
    x, weight = torch.randn(7, width, dtype=dtype), torch.randn(3, 3, width, dtype=dtype).transpose(1, 2)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(grouped, (x.requires_grad_(), weight.detach().requires_grad_(), ends), test_utils=tests)
    assert grouped(x, weight, ends).stride() == (16 // dtype.itemsize * -(-3 * dtype.itemsize // 16), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dense_transposed", "low_rank", "tucker_mixed", "bases_odd"])
def test_one_graph_serves_every_routing(name, dtype):
    experts = experts_of(name, dtype=dtype)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=False)
    for routing in ROUTINGS:
        inputs = routed(routing, dtype=dtype)
        slow, _ = both_ways(experts, *inputs)
        torch.testing.assert_close(compiled(*inputs), slow, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "low_rank", "tucker", "bases"])
def test_experts_are_exported_for_any_number_of_tokens(name):
    experts = experts_of(name)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(experts, routed(), dynamic_shapes=3 * ({0: tokens},))
    for num_tokens, routing in ((2, "random"), (30, "nobody")):
        inputs = routed(routing, num_tokens)
        slow, _ = both_ways(experts, *inputs)
        torch.testing.assert_close(program.module()(*inputs), slow, rtol=1e-4, atol=1e-4)


def calls_of(experts, inputs):
    """What the stacks are called with: expert numbers, or groups."""
    seen: list[type] = []
    forward = StackedLinear.forward

    def noting(self, x, expert):
        seen.append(type(expert))
        return forward(self, x, expert)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedLinear, "forward", noting)
        experts(*inputs)
    return {kind.__name__ for kind in seen}


def test_what_is_grouped_and_what_goes_one_by_one():
    one, many = routed(num_tokens=1), routed()
    with torch.no_grad():
        for name in CASES:
            mixed = name.startswith("bases")  # all bases at once would be as large as dense experts
            assert calls_of(experts_of(name), many) == {"int" if mixed else "Groups"}, name
            assert calls_of(experts_of(name), one) == {"Groups" if mixed or "tucker" in name else "int"}, name
    experts = experts_of("low_rank")
    assert calls_of(experts, one) == {"Groups"}, "a gradient of one expert is as large as all"
    handle = experts.stacks["down"].register_forward_pre_hook(lambda *_: None)
    assert calls_of(experts, many) == {"int"}, "whoever watches sees every expert with its tokens"
    handle.remove()
    assert calls_of(experts, many) == {"Groups"}


@pytest.mark.parametrize("name", CASES)
def test_autocast_means_the_same(name):
    experts, inputs = experts_of(name), routed()
    with torch.autocast("cpu", torch.bfloat16):
        slow, fast = both_ways(experts, *inputs)
    assert slow.dtype == fast.dtype == torch.float32
    torch.testing.assert_close(fast, slow, rtol=0, atol=0.02 * float(slow.detach().abs().max()))
    assert not torch.allclose(fast, experts(*inputs), rtol=1e-4, atol=1e-4)


def test_experts_that_differ_or_are_quantised_go_one_by_one():
    ranks = [LowRank.from_dense(torch.randn(2 * H, D), rank=1 + e % 2) for e in range(E)]
    rounded = [Quantized.of(LowRank.from_dense(torch.randn(2 * H, D), rank=2), bits=8) for _ in range(E)]
    for each in (ranks, rounded):
        stacks = {"gate_up": ExpertStack.from_experts(each), "down": CASES["dense"](H, D)}
        nn.init.normal_(stacks["down"].stack)
        assert calls_of(Experts(Shell(True, False), stacks, K), routed()) == {"int"}


def test_on_meta_and_offloaded():
    from accelerate import cpu_offload

    experts, inputs = experts_of("low_rank"), routed()
    with torch.no_grad():
        expected = experts(*inputs)
        empty = experts_of("low_rank").to("meta")
        assert empty(*(x.to("meta") for x in inputs)).shape == (N, D)
        cpu_offload(experts, execution_device=torch.device("cpu"))
        assert {p.device.type for p in experts.parameters()} == {"meta"}
        assert experts._is_grouped(inputs[0], N * K)
        assert torch.equal(experts(*inputs), expected)


def test_a_counter_sees_the_products():
    experts = experts_of("low_rank")
    with FlopCounterMode(display=False) as counter:
        experts(*routed())
    assert counter.get_total_flops() == 2 * N * K * sum(stack.macs_per_token for stack in experts.stacks.values())


@pytest.mark.parametrize(("width", "fits"), [(8, True), (6, False)])
def test_rows_of_whole_16_bytes_are_what_pytorch_multiplies(width, fits):
    assert multiplies(torch.randn(3, width), torch.randn(2, width, 8)) == fits
    assert multiplies(torch.randn(3, width), torch.randn(2, 8, width).transpose(1, 2)) == fits
    assert not multiplies(torch.randn(3, width).double(), torch.randn(2, width, 8).double())
