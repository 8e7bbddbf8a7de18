"""Quantized: the theorems of rounding to nearest, and a layer that behaves like any other operator."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_operator_contract import CASES as CONTRACT
from torch import nn
from torch.nn import functional as F

from tensormix.operators import Dense, LowRank, MixT, Padded, Quantized, Sparse, Sum, Zero, build
from tensormix.operators.packed import WORDS, Packed, num_packed_bytes, pack, unpack

I, O = 48, 80
BITS = sorted(WORDS)
INNER = {
    "dense": Dense.from_dense,
    "low_rank": lambda w: LowRank.from_dense(w, rank=5),
    "mixt": lambda w: MixT.from_dense(w, num_branches=3),
    "mixt_padded": lambda w: MixT.from_dense(w[:75, :42], num_branches=3),
    "sum": lambda w: Sum.from_dense(w, terms=[(MixT, {"num_branches": 3}), (LowRank, {"rank": 2})]),
    "sum_with_zero": lambda w: Sum(terms=[Dense.from_dense(w), Zero.from_dense(w)]),
    "padded": lambda w: Padded.from_dense(w, inner_type=LowRank, padded=(96, 64), rank=6),
    "sparse": lambda w: Sparse.from_dense(w, num_values=900),
    "zero": Zero.from_dense,
}
ROUNDING = [(8, "channel", True), (4, 16, True), (3, 7, False), (2, "tensor", False)]  # 7 leaves a short last group


@pytest.fixture(params=[(name, *r) for name in INNER for r in ROUNDING], ids=lambda p: "-".join(map(str, p)))
def pair(request):
    torch.manual_seed(0)
    name, bits, group, symmetric = request.param
    inner = INNER[name](torch.randn(O, I))
    return inner, Quantized.of(inner, bits=bits, group=group, symmetric=symmetric)


def packed(matrix, bits, group, symmetric=True):
    part = Packed(tuple(matrix.shape), bits=bits, group=group, symmetric=symmetric)
    part.round(matrix)
    return part


def spread(part):
    """The scale of every entry, (M, K)."""
    rows = part.scales.double().repeat_interleave(part.width, 1)[:, : part.length]
    return rows.reshape(part.shape)


def assert_close(actual, expected, tolerance):
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    assert actual.shape == expected.shape and error <= tolerance, error


# The integers


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(0, 70), st.integers(0, 2**20))
def test_packing_loses_nothing_and_wastes_no_bit(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    stored = pack(codes, bits)
    assert stored.dtype == torch.uint8
    assert torch.equal(unpack(stored, bits, count), codes.to(torch.uint8))
    in_one_word = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    assert len(stored) == num_packed_bytes(count, bits)
    assert 8 * len(stored) == bits * (-(-count // in_one_word) * in_one_word)  # the padding is less than one word


def test_the_layout_of_the_bytes_is_fixed():
    """Checkpoints depend on it: the first number lies in the lowest bits."""
    assert pack(torch.tensor([1, 2, 3, 0, 1]), 2).tolist() == [1 | 2 << 2 | 3 << 4, 1]
    assert pack(torch.tensor([1, 15, 7]), 4).tolist() == [1 | 15 << 4, 7]
    word = sum(code << 3 * place for place, code in enumerate([7, 0, 5, 1, 2, 3, 4, 6]))
    assert pack(torch.tensor([7, 0, 5, 1, 2, 3, 4, 6]), 3).tolist() == [word & 255, word >> 8 & 255, word >> 16]


GROUPS = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 12))
KINDS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64),
    "positive": lambda shape, g: torch.rand(shape, generator=g, dtype=torch.float64) + 1,
    "negative": lambda shape, g: -torch.rand(shape, generator=g, dtype=torch.float64) - 1,
    "huge_and_tiny": lambda shape, g: 10 ** (60 * torch.rand(shape, generator=g, dtype=torch.float64) - 40),
    "vanishing": lambda shape, g: 1e-44 * torch.randn(shape, generator=g, dtype=torch.float64),
    "zero": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
}


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 9), st.integers(1, 20), st.sampled_from(BITS), GROUPS, st.booleans(), st.sampled_from(list(KINDS)),
    st.integers(0, 2**20),
)  # fmt: skip
def test_no_entry_moves_by_more_than_half_its_scale(rows, columns, bits, group, symmetric, kind, seed):
    matrix = KINDS[kind]((rows, columns), torch.Generator().manual_seed(seed))
    part = packed(matrix, bits, group, symmetric)
    error = (part.numbers(torch.float64) - matrix).abs()
    assert (error <= spread(part) / 2 * (1 + 1e-9)).all()
    largest = matrix.abs().max() if symmetric else max(matrix.max(), 0) - min(matrix.min(), 0)
    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    assert float(part.scales.double().max()) <= max(float(largest) / steps * (1 + 2**-7), 1.2e-38)
    if kind == "zero":
        assert not part.numbers(torch.float32).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", ["tensor", "channel", 8])
def test_it_is_the_formula(bits, group):
    """s = max|W| / (2^(bits-1) - 1), q = round(W / s), W' = q s, with s as it is stored."""
    matrix = torch.randn(6, 20)
    groups = {"tensor": matrix.reshape(1, 1, -1), "channel": matrix[:, None]}.get(group)
    if groups is None:
        groups = F.pad(matrix, (0, 4)).reshape(6, 3, 8)
    scale = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).bfloat16().float()
    expected = (groups / scale).round() * scale
    expected = expected.reshape(6, -1)[:, :20]
    assert torch.equal(packed(matrix, bits, group).numbers(torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_one_rounding_away(dtype):
    part = packed(torch.randn(16, 24) * 1e-4, 8, 8)
    expected = part.numbers(torch.float64).to(dtype)
    assert torch.equal(part.numbers(dtype), expected)


# The operator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_is_the_product_with_the_rounded_matrices(pair, dtype):
    _, op = pair
    x = torch.randn(3, 7, op.in_features, dtype=dtype)
    y = op(x)
    assert y.dtype == dtype
    # One rounding of the numbers more than the 16 units of the operators' contract.
    assert_close(y, x.double() @ op.double().to_dense().T, 17 * torch.finfo(dtype).eps)


def test_every_matrix_is_rounded_by_itself(pair):
    inner, op = pair
    rounded = copy.deepcopy(inner)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(packed(parameter, op.bits, op.group, op.symmetric).numbers(torch.float32))
    assert torch.equal(op.to_dense(), rounded.to_dense())
    assert torch.equal(op.dequantized().to_dense(), rounded.to_dense())
    assert op.num_params == sum(p.numel() for p in inner.parameters())
    assert op.macs_per_token == inner.macs_per_token


def test_what_is_saved_gives_the_same_layer(pair):
    _, op = pair
    twin = build(spec := json.loads(json.dumps(op.spec)))
    twin.load_state_dict(op.state_dict())
    x = torch.randn(5, op.in_features)
    for other in (twin, copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert torch.equal(other(x), op(x)) and torch.equal(other.to_dense(), op.to_dense())
        assert other.spec == op.spec == spec
    for key in op.state_dict():
        with pytest.raises(RuntimeError, match="Missing key"):
            build(spec).load_state_dict({k: v for k, v in op.state_dict().items() if k != key})


def test_casting_the_layer_changes_no_number(pair):
    _, op = pair
    before = {name: tensor.clone() for name, tensor in op.state_dict().items()}
    expected = op(x := torch.randn(2, op.in_features))
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        op = op.to(dtype)
        assert op.weight.dtype == op.to_dense().dtype == dtype
        assert all(torch.equal(tensor, before[name]) for name, tensor in op.state_dict().items() if tensor.numel())
    assert torch.equal(op(x), expected)


def test_the_bias_moves_over_and_comes_back_and_trains():
    inner = INNER["mixt"](torch.randn(O, I))
    inner.bias = bias = nn.Parameter(torch.randn(O))
    op = Quantized.of(inner, bits=4, group=16)
    assert op.bias is bias and op.dequantized().bias is bias
    x, dy = torch.randn(3, I, requires_grad=True), torch.randn(3, O)
    assert torch.equal(op(x), op.multiply(x) + bias)
    op(x).backward(dy)
    assert_close(x.grad, dy @ op.to_dense(), 1e-5)
    assert_close(bias.grad, dy.sum(0), 1e-6)
    assert [name for name, _ in op.named_parameters()] == ["bias"]


def test_the_dequantized_operator_trains_and_leaves_the_original_alone():
    op = Quantized.of(INNER["sparse"](torch.randn(O, I)), bits=4, group=16)
    before = {name: tensor.clone() for name, tensor in op.state_dict().items()}
    free, x = op.dequantized(), torch.randn(4, I)
    assert_close(free(x), op(x), 1e-6)
    free(x).square().sum().backward()
    with torch.no_grad():
        for parameter in free.parameters():
            assert parameter.grad is not None and parameter.grad.any()
            parameter.sub_(parameter.grad)
        for buffer in free.buffers():
            buffer.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in op.state_dict().items())


def test_what_is_no_parameter_is_kept_as_it_is():
    inner = INNER["sparse"](torch.randn(O, I))
    op = Quantized.of(inner, bits=8, group=16)
    assert torch.equal(op.get_buffer("positions"), inner.positions)
    assert_close(op.to_dense(), inner.to_dense(), 0.01)
    assert op.num_bits == 8 * 900 + 16 * 57 + O * I  # 900 values, 57 scales and one bit for every entry


def test_it_stands_inside_other_operators():
    op = Sum(
        terms=[Quantized.of(Dense.from_dense(torch.randn(O, I)), bits=4), LowRank.from_dense(torch.randn(O, I), rank=2)]
    )
    padded = Padded(I - 3, O - 5, inner=op)
    twin = build(json.loads(json.dumps(padded.spec)))
    twin.load_state_dict(padded.state_dict())
    x = torch.randn(2, I - 3)
    assert torch.equal(twin(x), padded(x))
    assert_close(padded(x), x @ padded.to_dense().T, 1e-5)


@pytest.mark.parametrize("name", INNER)
def test_rounding_leaves_the_original_alone(name):
    inner = INNER[name](torch.randn(O, I))
    before = {key: tensor.clone() for key, tensor in inner.state_dict().items()}
    Quantized.of(inner, bits=2)(torch.randn(2, inner.in_features))
    assert all(torch.equal(tensor, before[key]) for key, tensor in inner.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in inner.parameters())


def test_from_dense_rounds_what_the_inner_type_fits():
    weight = torch.randn(O, I, dtype=torch.bfloat16)
    op = Quantized.from_dense(weight, inner_type=LowRank, rank=4, bits=4, group=16)
    expected = Quantized.of(LowRank.from_dense(weight, rank=4), bits=4, group=16).to_dense()
    assert torch.equal(op.to_dense(), expected) and expected.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_in_one_graph():
    op = Quantized.of(INNER["low_rank"](torch.randn(O, I)), bits=3, group=16, symmetric=False)
    x = torch.randn(2, I)
    assert torch.equal(torch.compile(op, backend="eager", fullgraph=True)(x), op(x))


# What is stored


def num_bits_of_file(op):
    """Bits of the data of a safetensors file, without its header, with everything but the bias."""
    data = save({name: tensor.contiguous() for name, tensor in op.state_dict().items() if name != "bias"})
    return 8 * (len(data) - 8 - int.from_bytes(data[:8], "little"))


# The contract demands a case of every operator in the table.
ALL = {**CONTRACT, **INNER}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_num_bits_are_those_of_the_file(name, dtype):
    op = ALL[name](torch.randn(O, I)).to(dtype)
    op.bias = nn.Parameter(torch.zeros(op.out_features))
    assert op.num_bits == num_bits_of_file(op)
    for bits, group, symmetric in ROUNDING:
        if not any(isinstance(part, Quantized) for part in op.modules()):
            small = Quantized.of(op, bits=bits, group=group, symmetric=symmetric)
            assert small.num_bits == num_bits_of_file(small)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: Quantized(inner=d, bits=5), r"Quantized: bits must be 2, 3, 4 or 8, got 5\."),
        (lambda d: Quantized(inner=d, bits=4.0), r"bits must be 2, 3, 4 or 8, got 4\.0\."),
        (
            lambda d: Quantized(inner=d, bits=4, group=0),
            r"group must be 'channel', 'tensor' or a whole number of at least 1, got 0\.",
        ),
        (lambda d: Quantized(inner=d, bits=4, group="chanel"), r"got 'chanel', did you mean 'channel'\?"),
        (lambda d: Quantized(inner=d, bits=4, group=True), r"got True\."),
        (
            lambda d: Quantized.of(Sum(terms=[Quantized(inner=d, bits=4)]), bits=2),
            r"Quantized: the Sum is quantized already; take the one it was made of",
        ),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(Dense(3, 4))
