"""Activation-aware matching against a dense least-squares solve, and what it may never do worse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitted import problem
from tensormix.compression.fitting import replace
from tensormix.compression.kinds import MatrixUnit
from tensormix.fitting.mixt_normal import MixtNormal
from tensormix.methods import Mixt
from tensormix.operators import MixT
from tensormix.operators.mixt import largest_num_branches
from tensormix.sites import Site
from tensormix.statistics import Gram


def seen(x):  # (N, I)
    gram = Gram(x.shape[1])
    gram.update(x)
    return {Gram: gram}


def relative_error(weight, op, x):
    weight = weight.double()
    return float((x @ (weight - op.to_dense().detach().double()).T).norm() / (x @ weight.T).norm())


def optimum(weight, x, **sizes):
    """The smallest relative error by a dense least-squares solve over the numbers of all cores."""
    op = MixT(x.shape[1], len(weight), **sizes)
    columns = []
    for left, right in op.windows:
        for unit in torch.eye(op.core_out * op.core_in, dtype=torch.float64).view(-1, op.core_out, op.core_in):
            full = torch.kron(torch.kron(torch.eye(left), unit), torch.eye(right))
            columns.append((full[: len(weight), : x.shape[1]] @ x.T).flatten())
    wanted = (weight @ x.T).reshape(-1, 1)
    design = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(design, wanted, driver="gelsd").solution
    return float((design @ solution - wanted).norm() / wanted.norm())


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    out_features=st.integers(4, 24),
    in_features=st.integers(4, 24),
    num_tokens=st.integers(1, 40),
    bond=st.integers(2, 3),
    padding=st.sampled_from(["multiple", "power"]),
    data=st.data(),
)
def test_it_reaches_the_dense_optimum(out_features, in_features, num_tokens, bond, padding, data):
    """Any shape, padded or not; fewer tokens than features included."""
    largest = largest_num_branches(in_features, out_features, bond=bond, padding=padding)
    sizes = {"num_branches": data.draw(st.integers(1, largest)), "bond": bond, "padding": padding}
    weight, x = problem(out_features, in_features, num_tokens)
    op = Mixt(init="aware", tolerance=0.0, max_steps=2000, **sizes).fit(weight, seen(x))
    assert relative_error(weight, op, x) == pytest.approx(optimum(weight, x, **sizes), abs=1e-6)


@pytest.mark.parametrize(
    ("O", "I", "sizes"),
    [
        (64, 192, {"num_branches": 4}),
        (48, 80, {"num_branches": 3}),
        (54, 27, {"num_branches": 2, "bond": 3}),
        (48, 47, {"num_branches": 3}),  # padded inputs
        (50, 33, {"num_branches": 2}),  # padded outputs
        (32, 32, {"num_branches": 5}),  # windows that share no bond
    ],
)
def test_the_products_are_those_of_the_dense_form(O, I, sizes):
    x = problem(O, I)[1]
    op = MixT(I, O, **sizes).double()
    normal = MixtNormal(op, x.T @ x)
    cores = torch.randn(op.num_branches, op.core_out, op.core_in, dtype=torch.float64)
    unknowns = normal.pack(cores)
    assert torch.equal(normal.unpack(unknowns), cores)
    torch.testing.assert_close(normal.unpack(normal.apply(unknowns)), normal.adjoint(normal.image(cores)))


def test_separate_problems_are_recognised():
    """64x192 with 4 branches never multiplies by a matrix of the size of the weight; padded outputs have to."""
    gram = torch.eye(64, dtype=torch.float64)
    assert MixtNormal(MixT(64, 192, num_branches=4).double(), gram).separate
    assert not MixtNormal(MixT(64, 190, num_branches=4).double(), gram).separate


def test_white_inputs_give_the_matched_mixture():
    weight, _ = problem(48, 80)
    white = 3 * torch.linalg.qr(torch.randn(100, 80, dtype=torch.float64)).Q
    aware, facts = Mixt(num_branches=3, init="aware").fit_with_facts(weight, seen(white))
    torch.testing.assert_close(aware.to_dense(), Mixt(num_branches=3).fit(weight, {}).to_dense())
    assert facts["output_error"] == pytest.approx(facts["matched_output_error"])


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    num_tokens=st.integers(1, 80),
    max_steps=st.integers(1, 30),
    smallest=st.sampled_from([1.0, 1e-2, 1e-4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    padded=st.booleans(),
)
def test_it_is_never_worse_than_matched_on_the_inputs(num_tokens, max_steps, smallest, dtype, padded):
    weight, x = problem(46 if padded else 48, 80, num_tokens, smallest)
    weight = weight.to(dtype)
    aware = Mixt(num_branches=3, init="aware", max_steps=max_steps).fit(weight, seen(x))
    matched = Mixt(num_branches=3).fit(weight, {})
    assert relative_error(weight, aware, x) <= relative_error(weight, matched, x) * (1 + 1e-5)


def test_where_the_inputs_decide_nothing_the_matched_mixture_stays():
    """One input direction: the answer is exact there, and elsewhere the weight has not been blown up."""
    weight, x = problem(48, 80, num_tokens=1)
    matched = Mixt(num_branches=3).fit(weight, {}).to_dense()
    aware = Mixt(num_branches=3, init="aware").fit(weight, seen(x))
    assert relative_error(weight, aware, x) < 1e-3
    assert (aware.to_dense() - matched).norm() < weight.norm()


def test_the_published_cut_of_the_error():
    """On inputs whose spectrum falls by 1e3 the error of 48x80 with 3 branches falls by more than a third."""
    weight, x = problem(80, 48, 400, 1e-3)
    _, facts = Mixt(num_branches=3, init="aware").fit_with_facts(weight, seen(x))
    assert facts["output_error"] < 0.65 * facts["matched_output_error"]


def test_the_facts_are_those_of_the_operator():
    weight, x = problem(48, 80)
    op, facts = Mixt(num_branches=3, init="aware", precision="float64").fit_with_facts(weight.float(), seen(x))
    assert facts["fit_precision"] == "float64" and 0 < facts["fit_steps"] < 200 and facts["fit_residual"] < 0.1
    assert facts["output_error"] == pytest.approx(relative_error(weight, op, x), rel=1e-4)
    matched = Mixt(num_branches=3).fit(weight, {})
    assert facts["matched_output_error"] == pytest.approx(relative_error(weight, matched, x), rel=1e-4)


def test_the_tolerance_decides_how_many_steps_there_are():
    weight, x = problem(48, 80, 400, 1e-3)
    fits = [
        Mixt(num_branches=3, init="aware", tolerance=tolerance).fit_with_facts(weight, seen(x))[1]
        for tolerance in (1e-1, 1e-3, 0.0)
    ]
    steps, errors = ([fact[key] for fact in fits] for key in ("fit_steps", "output_error"))
    assert steps == sorted(set(steps)) and errors == sorted(set(errors), reverse=True)
    assert errors[1] < 1.01 * errors[2]
    assert Mixt(num_branches=3, init="aware", max_steps=2).fit_with_facts(weight, seen(x))[1]["fit_steps"] == 2


def test_a_large_ridge_gives_the_matched_mixture():
    weight, x = problem(48, 80)
    method = Mixt(num_branches=3, init="aware", ridge=1e8)
    matched = Mixt(num_branches=3).fit(weight, {}).to_dense()
    torch.testing.assert_close(method.fit(weight, seen(x)).to_dense(), matched, rtol=1e-5, atol=1e-6)
    stats = seen(x)
    before = stats[Gram].mean.clone()
    method.fit(weight, stats)
    assert torch.equal(stats[Gram].mean, before)


def test_a_ridge_is_relative_to_the_inputs():
    """Inputs a thousand times as large get the same mixture."""
    weight, x = problem(48, 80)
    method = Mixt(num_branches=3, init="aware", ridge=0.3, precision="float64")
    small, large = (method.fit(weight, seen(scale * x)).to_dense() for scale in (1, 1000))
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-5)


def test_the_row_says_how_the_fit_went():
    layer = torch.nn.Sequential(torch.nn.Linear(32, 48))
    stats = seen(problem(48, 32)[1])
    with torch.no_grad():
        unit = MatrixUnit(layer, Mixt(num_branches=2, init="aware"), [Site("0", "linear", None, 0, layer[0])])
        (row,) = replace(unit, {"0": [stats]}, lambda site: 0)
    assert row["fit_steps"] > 0 and row["fit_precision"] == "float32"
    assert 0 < row["output_error"] < row["matched_output_error"] < row["relative_error"] + 0.5


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(5, 32), r"the calibration inputs are all zero, so they do not say which directions matter"),
        (torch.full((5, 32), torch.nan), r"the calibration inputs hold NaN or infinite values"),
    ],
)
def test_errors_say_what_is_wrong(x, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mixt(num_branches=2, init="aware").fit(torch.randn(48, 32), seen(x))
