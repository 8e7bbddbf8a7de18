"""MixT itself: its definition, its costs, the layers that it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.operators import MixT
from tensormix.operators.mixt import largest_num_branches


def kronecker(op):
    """Eq. 1 of arXiv 2605.25344 written out, cropped to the layer."""
    terms = []
    for k in range(1, op.num_branches + 1):
        left, right = torch.eye(op.bond ** (k - 1)), torch.eye(op.bond ** (op.num_branches - k))
        terms.append(torch.kron(torch.kron(left, getattr(op, f"core_{k - 1}").detach()), right))
    return torch.stack(terms).mean(0)[: op.out_features, : op.in_features]


def random(in_features, out_features, **sizes):
    op = MixT(in_features, out_features, **sizes)
    for core in op.cores:
        torch.nn.init.normal_(core)
    return op


@pytest.mark.parametrize(
    ("in_features", "out_features", "sizes"),
    [
        (48, 80, {"num_branches": 3}),
        (80, 48, {"num_branches": 2}),
        (32, 32, {"num_branches": 4}),  # the paper's example: windows share bonds
        (32, 32, {"num_branches": 5, "padding": "power"}),
        (54, 27, {"num_branches": 2, "bond": 3}),
        (50, 33, {"num_branches": 3}),
        (50, 33, {"num_branches": 3, "padding": "power"}),
        (7, 5, {"num_branches": 1, "padding": "power"}),
    ],
)
def test_it_is_equation_1(in_features, out_features, sizes):
    op = random(in_features, out_features, **sizes)
    torch.testing.assert_close(op.to_dense(), kronecker(op), rtol=1e-5, atol=1e-6)


def test_one_branch_is_the_dense_layer():
    weight = torch.randn(5, 7)
    for padding in ("multiple", "power"):
        op = MixT.from_dense(weight, num_branches=1, padding=padding)
        assert torch.equal(op.core_0, weight) and torch.equal(op.to_dense(), weight)


@pytest.mark.parametrize(
    ("padding", "parameters", "macs"), [("power", 16_777_216, 134_217_728), ("multiple", 12_648_448, 101_187_584)]
)
def test_costs_of_a_llama_2_7b_block(padding, parameters, macs):
    with torch.device("meta"):
        attention = MixT(4096, 4096, num_branches=4, padding=padding)
        up = MixT(4096, 11008, num_branches=4, padding=padding)
        down = MixT(11008, 4096, num_branches=4, padding=padding)
    ops = [attention] * 4 + [up] * 2 + [down]
    assert sum(op.in_features * op.out_features for op in ops) == 4 * 4096**2 + 3 * 4096 * 11008
    assert sum(op.num_params for op in ops) == parameters
    assert sum(op.macs_per_token for op in ops) == macs


@pytest.mark.parametrize(
    ("in_features", "out_features", "bond", "padding", "largest"),
    [
        (64, 128, 2, "multiple", 4),
        (64, 64, 2, "multiple", 6),
        (32, 32, 2, "power", 5),
        (33, 64, 2, "multiple", 3),
        (33, 64, 2, "power", 4),
        (63, 63, 2, "multiple", 3),
        (63, 63, 2, "power", 4),
        (81, 100, 3, "multiple", 3),
        (28, 28, 3, "power", 3),
        (2, 2, 2, "multiple", 1),
        (1, 1, 2, "power", 1),
        (1, 9, 2, "multiple", 1),
    ],
)
def test_the_largest_num_branches_works_and_the_next_is_refused(in_features, out_features, bond, padding, largest):
    assert largest_num_branches(in_features, out_features, bond=bond, padding=padding) == largest
    op = random(in_features, out_features, num_branches=largest, bond=bond, padding=padding)
    x = torch.randn(3, in_features)
    torch.testing.assert_close(op(x), x @ kronecker(op).T, rtol=1e-4, atol=1e-4)
    sentence = rf"num_branches={largest + 1} is too large for a {in_features}x{out_features} layer with bond {bond}; "
    with pytest.raises(ValueError, match=rf"^MixT: {sentence}the largest possible is {largest}\.$"):
        MixT(in_features, out_features, num_branches=largest + 1, bond=bond, padding=padding)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(2, 4), st.sampled_from(["multiple", "power"]), st.data())
def test_any_layer_works_up_to_the_largest_num_branches(in_features, out_features, bond, padding, data):
    largest = largest_num_branches(in_features, out_features, bond=bond, padding=padding)
    sizes = {"num_branches": data.draw(st.integers(1, largest)), "bond": bond, "padding": padding}
    op = random(in_features, out_features, **sizes)
    x = torch.randn(2, in_features)
    torch.testing.assert_close(op(x), x @ kronecker(op).T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"the largest possible is {largest}"):
        MixT(in_features, out_features, **{**sizes, "num_branches": largest + 1})


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"num_branches": 6},
            r"num_branches=6 is too large for a 64x128 layer with bond 2; the largest possible is 4\.",
        ),
        ({"num_branches": 0}, r"MixT: num_branches must be a whole number of at least 1, got 0\."),
        ({"num_branches": 2.5}, r"MixT: num_branches must be a whole number of at least 1, got 2\.5\."),
        ({"num_branches": 2, "bond": 1}, r"MixT: bond must be a whole number of at least 2, got 1\."),
        (
            {"num_branches": 2, "padding": "powers"},
            r"MixT: padding must be 'multiple' or 'power', got 'powers', did you mean 'power'\?",
        ),
        ({"num_branches": 10**9}, r"the largest possible is 4\."),
    ],
)
def test_errors_say_what_is_allowed(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        MixT(64, 128, **sizes)


def test_half_precision_is_within_twice_the_error_of_a_plain_product():
    """Both against fp64: the branches are summed in bf16, which may cost one more rounding than a dense product."""
    torch.manual_seed(0)
    op = MixT.from_dense(torch.randn(96, 64), num_branches=3).bfloat16()
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    plain = (x @ op.to_dense().T).double()
    truth = x.double() @ op.double().to_dense().T
    assert (op.bfloat16()(x).double() - truth).norm() <= 2 * (plain - truth).norm()
