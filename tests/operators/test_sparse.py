"""Sparse: the nearest matrix, the bits of its positions read by hand, bit-equal round trips."""

from __future__ import annotations

import json
from itertools import combinations, product
from math import ceil, comb, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.operators import Sparse, build
from tensormix.operators.sparse import GROUPED, PATTERNS, largest, pattern_count

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40))


def random_mask(out_features, in_features, num_values, seed=0):
    order = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(out_features * in_features, dtype=torch.bool)
    mask[order[:num_values]] = True
    return mask.view(out_features, in_features)


def make(pattern, out_features=6, in_features=16, num_values=30):
    count = num_values if pattern == "unstructured" else pattern_count(pattern, in_features, out_features)
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    return Sparse.from_dense(weight, num_values=count, pattern=pattern), weight


def codes_by_hand(op):
    """Bit b of code c is bit c % 8 of byte c // 8 of row b."""
    rows = op.positions.tolist()
    return [
        sum((rows[b][c // 8] >> c % 8 & 1) << b for b in range(len(rows))) for c in range(8 * op.positions.shape[1])
    ]


@pytest.mark.parametrize("num_values", range(1, 9))
def test_from_dense_is_the_nearest_of_all_sparse_matrices(num_values):
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(num_values), dtype=torch.float64)
    total = weight.square().sum()
    errors = [total - weight.flatten()[list(kept)].square().sum() for kept in combinations(range(8), num_values)]
    found = (weight - Sparse.from_dense(weight, num_values=num_values).to_dense()).square().sum()
    torch.testing.assert_close(found.detach(), min(errors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", GROUPED)
def test_from_dense_is_the_nearest_of_its_pattern(pattern):
    kept, size = GROUPED[pattern]
    op, weight = make(pattern, out_features=3, in_features=16)
    for group, found in zip(weight.view(-1, size), op.to_dense().view(-1, size), strict=True):
        assert int((found != 0).sum()) == kept
        best = min((group.square().sum() - group[list(c)].square().sum()) for c in combinations(range(size), kept))
        torch.testing.assert_close((group - found).square().sum().detach(), best, rtol=1e-5, atol=1e-6)


def test_one_bit_says_whether_an_entry_is_stored():
    op, _ = make("unstructured")
    assert op.positions.shape == (1, 12)
    assert codes_by_hand(op) == op.mask.flatten().int().tolist()


def test_few_entries_are_stored_by_their_index():
    op, weight = make("unstructured", out_features=9, in_features=40, num_values=5)
    assert op.positions.shape == (9, 1)  # 360 entries need 9 bits; 5 indices fill one byte each
    assert codes_by_hand(op)[:5] == sorted(weight.abs().flatten().topk(5).indices.tolist())


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 3), ("2:8", 5), ("3:8", 6), ("4:8", 7)])
def test_a_group_is_stored_as_the_number_of_its_subset(pattern, bits):
    kept, size = GROUPED[pattern]
    assert bits == ceil(log2(comb(size, kept)))
    subsets = list(combinations(range(size), kept))
    weight = torch.zeros(len(subsets), size)  # every subset once
    for row, subset in enumerate(subsets):
        weight[row, list(subset)] = torch.arange(1.0, kept + 1)
    op = Sparse.from_dense(weight, num_values=len(subsets) * kept, pattern=pattern)
    assert op.positions.shape == (bits, ceil(len(subsets) / 8))
    assert codes_by_hand(op)[: len(subsets)] == list(range(len(subsets)))
    assert torch.equal(op.to_dense(), weight) and torch.equal(op.mask, weight != 0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_bits_are_those_of_values_and_positions(pattern):
    op, _ = make(pattern, out_features=64, in_features=64, num_values=1000)
    entries, (kept, size) = 64 * 64, GROUPED.get(pattern, (0, 0))
    expected = entries if pattern == "unstructured" else entries // size * ceil(log2(comb(size, kept)))
    assert op.num_params == op.num_values == op.values.numel()
    assert op.num_bits == 32 * op.num_values + expected
    assert op.to(torch.bfloat16).num_bits == 16 * op.num_values + expected
    saved = {name: tensor.numel() * tensor.itemsize for name, tensor in op.state_dict().items()}
    assert set(saved) == {"values", "positions", "weight"} and 8 * sum(saved.values()) == op.num_bits


@pytest.mark.parametrize("num_values", [340, 341, 342, 400])
def test_the_cheaper_code_is_taken(num_values):
    with torch.device("meta"):
        op = Sparse(64, 64, num_values=num_values)
    bits = op.positions.shape[0] * (num_values if op.positions.shape[0] > 1 else 4096)
    assert bits == min(4096, 12 * num_values)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.floats(0, 1), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_any_mask_comes_back_bit_equal(shape, density, seed, dtype):
    out_features, in_features = shape
    num_values = max(1, round(density * out_features * in_features))
    mask = random_mask(out_features, in_features, num_values, seed)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    op = Sparse.from_mask(weight, mask)
    twin = build(json.loads(json.dumps(op.spec))).to(dtype)
    twin.load_state_dict(op.state_dict())
    assert torch.equal(twin.mask, mask) and torch.equal(op.values, weight[mask])
    assert torch.equal(twin.to_dense(), torch.where(mask, weight, 0))
    x = torch.eye(in_features, dtype=dtype)
    assert torch.equal(twin(x).T, twin.to_dense()), "multiply must write every value to its place"


def test_equal_scores_still_give_the_exact_number_and_the_earlier_ones():
    assert largest(torch.ones(3, 4), num_values=5).flatten().tolist() == [True] * 5 + [False] * 7
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
    assert largest(scores, num_values=3).nonzero()[:, 1].tolist() == [1, 2, 4]
    assert largest(torch.zeros(1, 8), num_values=4, pattern="2:4").nonzero()[:, 1].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cast_keeps_the_positions(pattern):
    op, weight = make(pattern)
    mask = op.mask
    op = op.to(torch.bfloat16).to("cpu", torch.float64)
    assert op.positions.dtype == torch.uint8 and torch.equal(op.mask, mask)
    assert torch.equal(op.to_dense(), torch.where(mask, weight.bfloat16().double(), 0))


@pytest.mark.parametrize(("pattern", "index"), [*product(GROUPED, [False]), ("unstructured", False), ("", True)])
def test_the_values_learn(pattern, index):
    op, weight = make(pattern) if not index else make("unstructured", 9, 40, 5)
    x = torch.randn(50, op.in_features, generator=torch.Generator().manual_seed(1))
    (op(x) - x @ (2 * weight).T).square().sum().backward()
    assert op.values.grad is not None and bool((op.values.grad != 0).all())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: Sparse(30, 8, num_values=120, pattern="2:4"),
            r"pattern 2:4 needs in_features that 4 divides, but the layer is 30x8; allowed there: unstructured\.",
        ),
        (
            lambda: Sparse(12, 8, num_values=48, pattern="4:8"),
            r"4:8 needs in_features that 8 divides, but the layer is 12x8; allowed there: unstructured, 2:4\.",
        ),
        (
            lambda: Sparse(8, 8, num_values=32, pattern="2-4"),
            r"unknown pattern '2-4', did you mean '2:4'\? Known: unstructured, 2:4, 2:8, 3:8, 4:8\.",
        ),
        (lambda: Sparse(8, 8, num_values=31, pattern="2:4"), r"pattern 2:4 stores 32 values of a 8x8 layer, not 31"),
        (lambda: Sparse(8, 4, num_values=0), r"num_values must be in 1\.\.32 for a 8x4 layer, got 0"),
        (lambda: Sparse(8, 4, num_values=33), r"num_values must be in 1\.\.32 for a 8x4 layer, got 33"),
        (
            lambda: Sparse.from_mask(torch.ones(1, 8), torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0]]).bool(), pattern="2:4"),
            r"pattern 2:4 needs 2 entries in every group, but the mask differs",
        ),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
