"""What every operator owes; `to_dense` is the oracle."""

from __future__ import annotations

import json

import pytest
import torch
from relative import assert_relative
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tensormix.operators import (
    OPERATORS,
    Blast,
    BlockTensorTrain,
    Chain,
    Concat,
    Dense,
    Kronecker,
    LowRank,
    MixT,
    Monarch,
    Padded,
    PerHead,
    Placed,
    Quantized,
    Remapped,
    Sparse,
    StructuredLinear,
    Sum,
    TensorTrain,
    View,
    Zero,
    build,
)

I, O = 48, 80


def _factors(O, I):
    """A square MixT, one of low rank, and a Kronecker product on the right."""
    return [
        (MixT, {"in_features": O, "out_features": O, "num_branches": 2}),
        (LowRank, {"in_features": I, "out_features": O, "rank": 5}),
        (Kronecker, {"in_features": I, "out_features": I, "outer": 8}),
    ]


CASES = {
    "mixt": lambda w: MixT.from_dense(w, num_branches=3),
    "mixt_one_branch": lambda w: MixT.from_dense(w, num_branches=1),
    "mixt_padded": lambda w: MixT.from_dense(w[:75, :42], num_branches=3),
    "mixt_power": lambda w: MixT.from_dense(w, num_branches=4, padding="power"),
    "mixt_overlapping": lambda w: MixT.from_dense(w[:32, :32], num_branches=4),
    "mixt_bond_3": lambda w: MixT.from_dense(w[:63, :45], num_branches=2, bond=3),
    "low_rank": lambda w: LowRank.from_dense(w, rank=5),
    "zero": lambda w: Zero.from_dense(w),
    "sparse": lambda w: Sparse.from_dense(w, num_values=700),
    "sparse_indices": lambda w: Sparse.from_dense(w, num_values=50),
    "sparse_3_of_8": lambda w: Sparse.from_dense(w, num_values=1440, pattern="3:8"),
    "dense": lambda w: Dense.from_dense(w),
    "padded": lambda w: Padded.from_dense(w, inner_type=LowRank, padded=(96, 64), rank=6),
    "padded_mixt": lambda w: Padded.from_dense(w[:60], inner_type=MixT, padded=(64, 64), num_branches=4),
    "placed": lambda w: Placed.from_dense(w, inner_type=Dense, kept=(33, 20)),
    "placed_low_rank": lambda w: Placed.from_dense(w, inner_type=LowRank, kept=(50, 48), out_groups=10, rank=4),
    "placed_in_groups": lambda w: Placed.from_dense(w, inner_type=Dense, kept=(80, 18), in_groups=6),
    "concat_out": lambda w: Concat.from_dense(w, parts=[(30, Dense, {}), (50, LowRank, {"rank": 3})]),
    "concat_in": lambda w: Concat.from_dense(w, parts=[(8, Dense, {}), (40, LowRank, {"rank": 3})], axis="in"),
    "concat_groups": lambda w: Concat.from_dense(w, parts=[(30, Dense, {}), (50, Dense, {})], groups=5),
    "per_head": lambda w: PerHead.from_dense(w, num_heads=5, rank=3),
    "per_head_of_one": lambda w: PerHead.from_dense(w, num_heads=1, rank=48),
    "sum": lambda w: Sum.from_dense(w, terms=[(MixT, {"num_branches": 3}), (LowRank, {"rank": 2})]),
    "chain": lambda w: Chain.from_dense(w[:, :40], factors=_factors(80, 40), steps=5),
    "chain_shuffled": lambda w: Chain.from_dense(w[:40], factors=_factors(40, 48), shuffle=4, steps=5),
    "monarch": lambda w: Monarch.from_dense(w, blocks=4, rank=2),
    "monarch_one_block": lambda w: Monarch.from_dense(w, blocks=1, rank=3),
    "tensor_train": lambda w: TensorTrain.from_dense(w, out_modes=[4, 4, 5], in_modes=[3, 4, 4], ranks=[3, 4]),
    "tensor_train_from_the_middle": lambda w: TensorTrain.from_dense(
        w, out_modes=[5, 1, 16], in_modes=[1, 48, 1], ranks=[2, 2]
    ),
    "tensor_train_of_one": lambda w: TensorTrain.from_dense(w, out_modes=[80], in_modes=[48], ranks=[]),
    "block_tensor_train": lambda w: BlockTensorTrain.from_dense(w, in_blocks=3, out_blocks=8, rank=2),
    "blast": lambda w: Blast.from_dense(w, blocks=4, rank=3, steps=5),
    "kronecker": lambda w: Kronecker.from_dense(w[:48], outer=6),
    "sum_of_sum": lambda w: Sum(terms=[Sum(terms=[LowRank.from_dense(w, rank=1), Zero.from_dense(w)])]).to(w),
}


@pytest.fixture(params=CASES, ids=str)
def op(request):
    torch.manual_seed(0)
    return CASES[request.param](torch.randn(O, I))


def inputs(op, *batch, dtype=torch.float32):
    return torch.randn(*batch, op.in_features, dtype=dtype)


def test_every_operator_has_a_case():
    covered = {type(make(torch.randn(O, I))) for make in CASES.values()}
    linear = {cls for cls in OPERATORS.values() if issubclass(cls, StructuredLinear)}
    # They hold integers, which have no gradients and a dtype of their own: test_quantized.py, test_remapped.py.
    # A view needs an owner: test_shared.py.
    assert linear - {Quantized, Remapped, View} <= covered, f"add a case for {linear - covered}"


def test_the_table_names_every_operator_class():
    assert all(name == cls.__name__ for name, cls in OPERATORS.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_is_the_dense_product(op, dtype):
    """Against the same numbers in fp64.

    At most 16 units: sums of 96 products in the accumulating precision drift by about sqrt(96) < 10 roundings, and
    every output goes through at most 6 more (branch, three additions, scale, sum of terms).
    """
    op = op.to(dtype)
    x = inputs(op, 3, 7, dtype=dtype)
    y = op(x)
    assert y.dtype == dtype
    truth = x.double() @ op.double().to_dense().T
    assert_relative(y.double(), truth, 16 * torch.finfo(dtype).eps, "forward")


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3, 4)], ids=str)
def test_forward_takes_any_batch(op, batch):
    y = op(inputs(op, *batch))
    assert y.shape == (*batch, op.out_features)


def test_forward_takes_inputs_in_any_memory_order(op):
    x = torch.randn(op.in_features, 6).T
    assert_relative(op(x), op(x.contiguous()), 1e-6, "transposed input")
    assert_relative(op(x.expand(2, 6, -1)), op(x.contiguous()).expand(2, 6, -1), 1e-6, "expanded input")


def test_forward_leaves_its_inputs_alone(op):
    x = inputs(op, 5)
    before = x.clone()
    op(x)
    assert torch.equal(x, before)


def test_gradients_are_the_dense_gradients(op):
    op = op.double()
    x = inputs(op, 5, dtype=torch.float64).requires_grad_()
    dy = torch.randn(5, op.out_features, dtype=torch.float64)
    wanted = {"x": x, **dict(op.named_parameters())}
    fast, slow = op(x), x @ op.to_dense().T
    if not wanted.keys() - {"x"}:  # no parameters: the output is constant
        assert not fast.requires_grad
        return
    options = {"allow_unused": True, "materialize_grads": True}
    fast, slow = (torch.autograd.grad(y, list(wanted.values()), dy, **options) for y in (fast, slow))
    for name, a, b in zip(wanted, fast, slow, strict=True):
        assert_relative(a, b, 1e-13, f"gradient of {name}")


def test_spec_survives_json_and_rebuilds_it(op):
    spec = json.loads(json.dumps(op.spec))
    twin = build(spec)
    twin.load_state_dict(op.state_dict())
    assert torch.equal(twin.to_dense(), op.to_dense())
    assert twin.spec == op.spec
    assert spec == op.spec, "the spec must not need tuples"


def test_builds_on_meta(op):
    with torch.device("meta"):
        twin = build(op.spec)
    assert {t.device.type for t in twin.state_dict().values()} == {"meta"}
    assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in op.state_dict().items()}
    assert (twin.num_params, twin.macs_per_token) == (op.num_params, op.macs_per_token)


def test_macs_match_the_flop_counter(op):
    with FlopCounterMode(display=False) as counter:
        op(inputs(op, 7))
    assert counter.get_total_flops() == 2 * 7 * op.macs_per_token


def test_parameters_are_matrices_and_counted_without_the_bias(op):
    assert all(p.ndim == 2 or isinstance(op, Sparse) for p in op.parameters())  # its values are one row
    count = sum(p.numel() for p in op.parameters())
    assert op.num_params == count
    op.bias = nn.Parameter(torch.zeros(op.out_features))
    assert op.num_params == count


def test_bias_is_added(op):
    x = inputs(op, 5)
    plain, bias = op(x), torch.randn(op.out_features)
    op.bias = nn.Parameter(bias)
    assert torch.equal(op(x), plain + bias)
    assert torch.equal(op.state_dict()["bias"], bias)


def test_a_dense_weight_does_not_load(op):
    assert op.state_dict()["weight"].shape == (0,)
    state = {**op.state_dict(), "weight": torch.zeros(op.out_features, op.in_features)}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        op.load_state_dict(state)
    dense = nn.Linear(op.in_features, op.out_features, bias=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        dense.load_state_dict(op.state_dict(), strict=False)


def test_state_dict_is_strict(op):
    for key in op.state_dict():
        state = {k: v for k, v in op.state_dict().items() if k != key}
        with pytest.raises(RuntimeError, match="Missing key"):
            build(op.spec).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_from_dense_keeps_the_dtype_and_the_weight(name, dtype):
    weight = nn.Parameter(torch.randn(O, I, dtype=dtype))
    before = weight.detach().clone()
    op = CASES[name](weight)
    assert {t.dtype for t in op.state_dict().values() if t.is_floating_point()} == {dtype}
    assert torch.equal(weight, before) and weight.grad_fn is None
    assert all(p.is_leaf and p.requires_grad for p in op.parameters())


def test_zero_is_zero_and_a_low_rank_term_makes_a_sum_better():
    weight = torch.randn(O, I)
    assert not Zero.from_dense(weight).to_dense().any()
    alone = MixT.from_dense(weight, num_branches=3).to_dense()
    both = Sum.from_dense(weight, terms=[(MixT, {"num_branches": 3}), (LowRank, {"rank": 2})])
    tail = torch.linalg.svdvals(weight - alone)[2:].norm()
    torch.testing.assert_close((weight - both.to_dense()).norm(), tail, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [1, 5, 48])
def test_low_rank_reaches_the_known_optimum(rank):
    weight = torch.randn(O, I, dtype=torch.float64)
    error = (weight - LowRank.from_dense(weight, rank=rank).to_dense()).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[rank:].norm(), rtol=1e-12, atol=1e-12)


def test_padded_is_the_cropped_inner_operator():
    inner = LowRank.from_dense(torch.randn(O, I), rank=3)
    op, x = Padded(40, 70, inner=inner), torch.randn(5, 40)
    torch.testing.assert_close(op(x), inner(F.pad(x, (0, 8)))[:, :70])
    torch.testing.assert_close(op.to_dense(), inner.to_dense()[:70, :40])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LowRank(I, O, rank=49), r"LowRank: rank must be in 1..48 for a 48x80 layer, got 49"),
        (lambda: LowRank(I, O, rank=0), r"LowRank: rank must be in 1..48 for a 48x80 layer, got 0"),
        (lambda: Zero(0, 4), r"Zero: in_features and out_features must be at least 1, got 0, 4"),
        (lambda: Padded(I, O, inner=Zero(I, 79)), r"as large as the 48x80 layer, got 48x79"),
        (lambda: Sum(terms=[]), r"Sum: needs one or more terms of one shape, got no terms"),
        (lambda: Sum(terms=[Zero(2, 3), Zero(3, 2)]), r"terms of one shape, got 2x3, 3x2"),
        (lambda: Placed(I, O, inner=Zero(49, O)), r"Placed: the inner in_features must be in 1\.\.48, got 49"),
        (
            lambda: Placed(I, O, inner=Zero(I, 50), out_groups=4),
            r"Placed: out_groups=4 must divide the out_features of the layer \(80\) and of the inner operator \(50\)",
        ),
        (lambda: Concat(parts=[]), r"parts that agree on the axis that is not 'out', got no parts"),
        (lambda: Concat(parts=[Zero(2, 3), Zero(3, 2)]), r"on the axis that is not 'out', got 2x3, 3x2"),
        (lambda: Concat(parts=[Zero(2, 3)], axis="inn"), r"axis must be 'out' or 'in', got 'inn', did you mean 'in'\?"),
        (
            lambda: Concat(parts=[Zero(2, 4), Zero(2, 3)], groups=2),
            r"groups=2 must divide the rows of every part \(4, 3\)",
        ),
        (lambda: PerHead(I, O, num_heads=7, rank=1), r"PerHead: num_heads must divide the 80 outputs, got 7"),
        (lambda: PerHead(I, O, num_heads=5, rank=17), r"rank must be in 1\.\.16 for 5 heads of a 48x80 layer, got 17"),
        (lambda: build({"operator": "Mixt"}), r"unknown operator 'Mixt', did you mean 'MixT'\? Known: MixT, LowRank"),
        (lambda: build({"operator": "qqq"}), r"unknown operator 'qqq'\. Known: MixT, LowRank"),
        (lambda: build({}), r"unknown operator '\(none\)'"),
        (
            lambda: build({"operator": "LowRank", "in_features": 2, "out_features": 2, "ranks": 1}),
            r"LowRank: unknown size 'ranks', did you mean 'rank'\? Known: in_features, out_features, rank\.",
        ),
        (lambda: build({"operator": "LowRank", "rank": 1}), r"LowRank: missing size in_features, out_features\."),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
