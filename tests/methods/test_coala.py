from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitted import draw, seen, tail
from tensormix.methods import Coala, Svd, SvdLlm
from tensormix.statistics import Gram, QRFactor


def problem(O=24, I=32, num_tokens=100, smallest=1e-2):
    """A weight (O, I), and inputs (N, I) whose spectrum falls to `smallest` in no particular basis; fp64."""
    scales = torch.logspace(0, torch.tensor(smallest).log10().item(), I, dtype=torch.float64)
    return draw(O, I), draw(num_tokens, I, seed=1) * scales @ torch.linalg.qr(draw(I, I, seed=2)).Q


def output_error(weight, op, x):
    return (x.double() @ (weight - op.to_dense().detach()).double().T).norm()


@settings(deadline=None, max_examples=40)
@given(
    O=st.integers(2, 12),
    I=st.integers(2, 12),
    num_tokens=st.integers(1, 20),
    keep=st.floats(0, 1),
    mu=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    dead=st.booleans(),
)
def test_it_reaches_the_optimum_of_its_objective(O, I, num_tokens, keep, mu, dead):
    """||(W - W') X||^2 + m ||W - W'||^2 = ||(W - W') [X, sqrt(m) 1]||^2: its optimum is a tail of singular values."""
    weight, x = problem(O, I, num_tokens)
    if dead:
        x[:, 0] = 0
    rank = 1 + int(keep * (O * I // (O + I) - 1))
    op = Coala(keep=rank * (O + I) / (O * I), mu=mu).fit(weight, seen(QRFactor, x))
    assert op.rank == rank
    torch.testing.assert_close(op.left.T @ op.left, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    m = mu * x.square().sum() / I
    reached = (output_error(weight, op, x).square() + m * (weight - op.to_dense()).norm().square()).sqrt()
    lowest = tail(weight @ torch.cat([x.T, m.sqrt() * torch.eye(I, dtype=x.dtype)], dim=1), rank)
    scale = (x @ weight.T).norm()
    torch.testing.assert_close(reached / scale, lowest / scale, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("repeats", [1, 20])
@pytest.mark.parametrize("num_tokens", [100, 20, 5])
def test_it_is_svd_llm_in_exact_arithmetic(num_tokens, repeats):
    """Fewer tokens than features, and fewer than the rank, included; also when they come again and again, so that only
    rounding tells the factor from one of full rank."""
    weight, x = problem(num_tokens=num_tokens, smallest=0.3)
    x = x.repeat(repeats, 1)
    coala, svd_llm = Coala(keep=0.7).fit(weight, seen(QRFactor, x)), SvdLlm(keep=0.7).fit(weight, seen(Gram, x))
    assert coala.rank == 9
    torch.testing.assert_close(coala.to_dense(), svd_llm.to_dense(), rtol=1e-8, atol=1e-9)


def test_inputs_that_the_weight_ignores_leave_the_ranks_to_the_rest():
    """Nothing can go wrong on the data, so the plain truncated SVD is the nearest."""
    turn = torch.linalg.qr(draw(32, 32)).Q
    weight, x = draw(24, 32), draw(100, 32, seed=1)
    weight[:, :10], x[:, 10:] = 0, 0
    op = Coala(keep=0.5).fit(weight @ turn, seen(QRFactor, x @ turn))
    assert output_error(weight @ turn, op, x @ turn) < 1e-12
    torch.testing.assert_close((weight @ turn - op.to_dense()).norm(), tail(weight, op.rank))


def test_a_large_mu_gives_the_plain_svd_and_a_small_one_the_optimum_on_the_data():
    weight, x = problem()
    plain, stats = Svd(keep=0.4).fit(weight, {}).to_dense(), seen(QRFactor, x)
    torch.testing.assert_close(Coala(keep=0.4, mu=1e9).fit(weight, stats).to_dense(), plain, rtol=1e-6, atol=1e-7)
    fits = [Coala(keep=0.4, mu=mu).fit(weight, stats) for mu in (0.0, 1e-3, 1e-1, 10.0)]
    on_data = [float(output_error(weight, op, x)) for op in fits]
    on_weight = [float((weight - op.to_dense()).norm().detach()) for op in fits]
    assert on_data == sorted(on_data) and on_weight == sorted(on_weight, reverse=True)


def test_mu_is_relative_to_the_inputs():
    weight, x = problem()
    once = Coala(keep=0.4, mu=0.1).fit(weight, seen(QRFactor, x)).to_dense()
    for other in (100 * x, torch.cat([x, x, x])):
        torch.testing.assert_close(Coala(keep=0.4, mu=0.1).fit(weight, seen(QRFactor, other)).to_dense(), once)


def ill_conditioned():
    """Four output directions that matter and are driven by inputs 30,000 times smaller than the largest.

    The four largest singular values of the weight belong to others, so that not to see the inputs is to be wrong."""
    outputs, inputs = torch.linalg.qr(draw(16, 16)).Q, torch.linalg.qr(draw(16, 16, seed=1)).Q
    tokens = torch.linalg.qr(draw(300, 16, seed=2)).Q
    of_input = torch.tensor([1.0] * 8 + [3e-5] * 4 + [1e-5] * 4, dtype=torch.float64)
    of_output = torch.tensor([0.1] * 8 + [1.0] * 4 + [0.5] * 4, dtype=torch.float64)
    return (outputs * (of_output / of_input) @ inputs.T).float(), (tokens * of_input @ inputs.T).float()


def test_in_fp32_it_keeps_what_svd_llm_loses():
    weight, x = ill_conditioned()
    coala = Coala(keep=0.5).fit(weight, seen(QRFactor, x, torch.float32))
    svd_llm = SvdLlm(keep=0.5).fit(weight, seen(Gram, x, torch.float32))
    assert coala.rank == svd_llm.rank == 4
    lowest = tail(weight.double() @ x.double().T, 4)
    assert output_error(weight, coala, x) < 1.05 * lowest
    assert output_error(weight, svd_llm, x) > 1.5 * lowest
    assert output_error(weight, SvdLlm(keep=0.5).fit(weight, seen(Gram, x)), x) < 1.05 * lowest, "in fp64 it does not"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_narrow_weights_are_fitted_wide(dtype, precision):
    weight, x = problem()
    weight = weight.to(dtype)
    op = Coala(keep=0.4).fit(weight, seen(QRFactor, x, precision))
    best = Coala(keep=0.4).fit(weight.double(), seen(QRFactor, x))
    assert op.left.dtype == op.right.dtype == dtype
    exact = best.left @ best.right
    rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert (op.left.double() @ op.right.double() - exact).norm() < rounding * exact.norm()


def test_a_weight_of_zero_stays_zero():
    op = Coala(keep=0.4).fit(torch.zeros(24, 32), seen(QRFactor, problem()[1]))
    assert not op.to_dense().any()
    torch.testing.assert_close(op.left.T @ op.left, torch.eye(op.rank))


X = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
W = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Coala(keep=0.5, ratio=0.5), r"ratio\n\s+Extra inputs are not permitted"),
        (lambda: Coala(keep=0.5, mu=-0.1), r"greater than or equal to 0"),
        (lambda: Coala(keep=0.5, mu=float("nan")), r"finite number"),
        (
            lambda: Coala(keep=0.01).empty(64, 128),
            r"Coala: keep=0\.01 leaves no rank for a 64x128 layer; the smallest usable keep is 0\.0235\.",
        ),
        (
            lambda: Coala(keep=1).fit(torch.ones(1, 9), seen(QRFactor, torch.ones(3, 9))),
            r"Coala: rank 1 of a 9x1 layer stores 10 numbers, the dense weight 9; leave this layer dense\.",
        ),
        (lambda: Coala(keep=0.5).fit(W, {QRFactor: QRFactor(32)}), r"QRFactor: no tokens were seen"),
        (lambda: Coala(keep=0.5).fit(W, seen(QRFactor, 0 * X)), r"the calibration inputs are all zero, so they do not"),
        (lambda: Coala(keep=0.5).fit(W, seen(QRFactor, X / 0)), r"the calibration inputs hold NaN or infinite values"),
        (lambda: Coala(keep=0.5).fit(W / 0, seen(QRFactor, X)), r"the weight holds NaN or infinite values"),
    ],
)
def test_errors_say_what_is_wrong(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
