from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitted import problem, seen, tail
from tensormix.fitting.whitening import gram_factor, gram_root, output_basis, refit_left
from tensormix.methods import Coala, Svd, SvdLlm
from tensormix.statistics import DenseGram, Gram, PropagatedGram, QRFactor


def output_error(weight, op, x):
    return (x @ (weight - op.to_dense().detach()).T).norm()


@settings(deadline=None, max_examples=40)
@given(
    O=st.integers(2, 12), I=st.integers(2, 12), num_tokens=st.integers(1, 20), keep=st.floats(0, 1), dead=st.booleans()
)
def test_the_error_is_the_singular_values_that_were_cut_off(O, I, num_tokens, keep, dead):
    """||W X - A B X||_F is the tail of the singular values of W X, below which no matrix of this rank can go."""
    weight, x = problem(O, I, num_tokens, seed=num_tokens)
    if dead:
        x[:, 0] = 0
    rank = 1 + int(keep * (O * I // (O + I) - 1))
    op = SvdLlm(keep=rank * (O + I) / (O * I)).fit(weight, seen(Gram, x))
    assert op.rank == rank
    scale = (x @ weight.T).norm()
    torch.testing.assert_close(
        output_error(weight, op, x) / scale, tail(weight @ x.T, rank) / scale, rtol=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (24, 24)])
def test_it_is_the_published_product_of_factors(shape):
    """U_r sqrt(S_r) and sqrt(S_r) V_r^T S^-1, with S the Cholesky factor that the paper takes."""
    weight, x = problem(*shape)
    op = SvdLlm(keep=0.5).fit(weight, seen(Gram, x))
    root = torch.linalg.cholesky(x.T @ x)
    u, s, vt = torch.linalg.svd(weight @ root)
    r = op.rank
    left = u[:, :r] * s[:r].sqrt()
    right = s[:r, None].sqrt() * vt[:r] @ torch.linalg.inv(root)
    torch.testing.assert_close(op.to_dense(), left @ right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_tokens", [20, 5], ids=["rank below the directions", "directions below the rank"])
def test_fewer_tokens_than_features(num_tokens):
    """A Cholesky factor does not exist. Of all optima on the data it takes the one that is nearest to the weight: the
    limit of a vanishing ridge, which is computed here the long way."""
    weight, x = problem(num_tokens=num_tokens, smallest=0.3)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(x.T @ x)
    op = SvdLlm(keep=0.7).fit(weight, seen(Gram, x))
    assert op.rank == 9
    scale = (x @ weight.T).norm()
    torch.testing.assert_close(output_error(weight, op, x) / scale, tail(weight @ x.T, 9) / scale, rtol=1e-7, atol=1e-7)
    root = torch.linalg.cholesky(x.T @ x + 1e-7 * torch.eye(32, dtype=x.dtype))
    u, s, vt = torch.linalg.svd(weight @ root)
    limit = (u[:, :9] * s[:9]) @ vt[:9] @ torch.linalg.inv(root)
    torch.testing.assert_close(op.to_dense(), limit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [100, 5])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_factor_is_a_root_of_what_was_measured(monkeypatch, num_tokens, ridge):
    """Without one eigenvector, and the same fit as from eigenvectors."""
    weight, x = problem(num_tokens=num_tokens, smallest=0.3)
    gram = x.T @ x
    root, eye = gram_root(gram, ridge), torch.eye(32, dtype=gram.dtype)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", None)
        factor, noise = gram_factor(gram, ridge)
    wanted = gram + ridge * gram.diagonal().mean() * eye
    torch.testing.assert_close(factor @ factor.T, wanted, rtol=1e-10, atol=1e-10 * float(gram.norm()))
    assert 0 < noise < 1e-7 * gram.norm().sqrt()
    slow, fast = output_basis(weight, root, 9), output_basis(weight, factor, 9, noise)
    torch.testing.assert_close(fast @ fast.T, slow @ slow.T, rtol=1e-8, atol=1e-9)


def test_a_gram_matrix_that_rounding_made_indefinite():
    """A single precision sum in a double: its eigenvalues below zero are left out, as without Cholesky."""
    x = problem(num_tokens=5, smallest=0.3)[1]
    gram = (x.T @ x).float().double()
    assert torch.linalg.eigvalsh(gram)[0] < -1e-8
    factor, noise = gram_factor(gram)
    assert noise == 0 and torch.equal(factor, gram_root(gram))


def test_inputs_that_the_weight_ignores_leave_the_ranks_to_the_rest():
    """All inputs lie where W is zero: nothing can go wrong on the data, so the plain truncated SVD is the nearest."""
    weight, x = problem()
    weight[:, :10], x[:, 10:] = 0, 0
    op = SvdLlm(keep=0.5).fit(weight, seen(Gram, x))
    assert output_error(weight, op, x) < 1e-12
    torch.testing.assert_close((weight - op.to_dense()).norm(), tail(weight, op.rank))


def test_it_beats_the_plain_svd_on_the_outputs_and_loses_on_the_weight():
    """Weight and inputs share their directions: the gains fall from 2 to 1, the inputs grow from 1e-3 to 1. The plain
    SVD keeps the largest gains, this one the largest products, and both errors are known in advance."""
    outputs, inputs = torch.linalg.qr(problem(24, 24)[0]).Q, torch.linalg.qr(problem(32, 24)[0]).Q
    gains = torch.linspace(2, 1, 24, dtype=torch.float64)
    sizes = torch.logspace(-3, 0, 24, dtype=torch.float64)
    weight = outputs * gains @ inputs.T
    x = torch.linalg.qr(problem(100, 24)[0]).Q * sizes @ inputs.T
    plain, white = Svd(keep=0.4).fit(weight, {}), SvdLlm(keep=0.4).fit(weight, seen(Gram, x))
    products = gains * sizes
    torch.testing.assert_close(output_error(weight, plain, x), products[5:].norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output_error(weight, white, x), products.sort().values[:-5].norm(), rtol=1e-6, atol=0)
    assert output_error(weight, white, x) < 0.3 * output_error(weight, plain, x)
    assert (weight - plain.to_dense()).norm() < (weight - white.to_dense()).norm()


def test_it_is_the_plain_svd_for_white_inputs():
    weight, _ = problem()
    x = 3 * torch.linalg.qr(torch.randn(50, 32, dtype=torch.float64)).Q
    plain, white = Svd(keep=0.4).fit(weight, {}), SvdLlm(keep=0.4).fit(weight, seen(Gram, x))
    torch.testing.assert_close(white.to_dense(), plain.to_dense(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(white.left.norm(dim=0), plain.left.norm(dim=0))


def test_the_ridge_is_relative_and_the_mu_of_coala():
    weight, x = problem()
    for ridge in (1e-3, 1.0):
        ridged = SvdLlm(keep=0.4, ridge=ridge).fit(weight, seen(Gram, x)).to_dense()
        scaled = SvdLlm(keep=0.4, ridge=ridge).fit(weight, seen(Gram, 100 * x)).to_dense()
        torch.testing.assert_close(scaled, ridged, rtol=1e-8, atol=1e-10)
        coala = Coala(keep=0.4, mu=ridge).fit(weight, seen(QRFactor, x)).to_dense()
        torch.testing.assert_close(ridged, coala, rtol=1e-8, atol=1e-10)


def streams(**options):
    weight, dense = problem(**options)
    generator = torch.Generator().manual_seed(1)
    propagated = dense + 0.2 * torch.randn(dense.shape, dtype=torch.float64, generator=generator) * dense.std(0)
    return weight, dense, propagated


@pytest.mark.parametrize("size", [1, 1e-9])
def test_the_update_is_the_least_squares_fit_of_the_left_factor(size):
    weight, dense, propagated = streams()
    weight *= size
    before = SvdLlm(keep=0.4).fit(weight, seen(Gram, dense))
    stats = {**seen(DenseGram, dense), **seen(PropagatedGram, propagated)}
    after = SvdLlm(keep=0.4, update=True).fit(weight, stats)
    solution = torch.linalg.lstsq(propagated @ before.right.T, propagated @ weight.T).solution.T
    torch.testing.assert_close(after.to_dense(), (solution @ before.right).detach(), rtol=1e-8, atol=1e-9 * size)
    assert output_error(weight, after, propagated) < (1 - 1e-3) * output_error(weight, before, propagated)
    assert output_error(weight, before, dense) < (1 - 1e-3) * output_error(weight, after, dense)


def test_the_update_changes_nothing_where_both_streams_are_equal():
    weight, dense, _ = streams()
    stats = {**seen(DenseGram, dense), **seen(PropagatedGram, dense)}
    before = SvdLlm(keep=0.4).fit(weight, seen(Gram, dense))
    after = SvdLlm(keep=0.4, update=True).fit(weight, stats)
    torch.testing.assert_close(after.to_dense(), before.to_dense(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_tokens", [3, 100], ids=["few tokens", "tokens the right factor hardly sees"])
def test_the_update_changes_as_little_as_it_can(num_tokens):
    """The inputs reach three directions of the five rows of the right factor, the others by less than a Gram matrix can
    tell: the left factor changes by the smallest least squares solution, what the others multiply stays what it was,
    and the error falls by Pythagoras."""
    weight, dense, x = streams(smallest=1e-5)  # so steep that the Gram matrix blurs what is not reached
    before = SvdLlm(keep=0.4).fit(weight, seen(Gram, dense))
    assert before.rank == 5
    lengths = before.left.detach().norm(dim=0)
    left, right = before.left.detach() / lengths, before.right.detach() * lengths[:, None]  # the left one orthonormal
    unseen_rows = torch.linalg.pinv(right)[:, 3:] @ right[3:]
    x = (x - x @ unseen_rows.T * (1 - 1e-9) * (num_tokens > 3))[:num_tokens]
    missing = x @ (weight - left @ right).T
    smallest = torch.linalg.lstsq(x @ right.T, missing, rcond=1e-8, driver="gelsd").solution.T
    assert smallest.norm() > 0.01
    torch.testing.assert_close(refit_left(weight, left, right, x.T) - left, smallest, rtol=1e-7, atol=1e-8)
    after = SvdLlm(keep=0.4, update=True).fit(weight, {**seen(DenseGram, dense), **seen(PropagatedGram, x)})
    torch.testing.assert_close(after.to_dense().detach(), (left + smallest) @ right, rtol=1e-6, atol=1e-7)
    errors = [output_error(weight, op, x).square() for op in (before, after)]
    torch.testing.assert_close(errors[0] - errors[1], (x @ (smallest @ right).T).square().sum(), rtol=1e-6, atol=1e-9)


def test_what_it_needs_depends_on_the_update():
    assert SvdLlm.needs == SvdLlm(keep=0.5).needs == (Gram,)
    method = SvdLlm(keep=0.5, update=True)
    assert method.needs == (DenseGram, PropagatedGram)
    assert [kind.stream for kind in method.needs] == ["dense", "propagated"]
    assert "needs" not in method.model_dump()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_narrow_weights_are_fitted_wide(dtype, precision):
    """What is stored is the fp64 fit, rounded once."""
    weight, x = problem()
    weight = weight.to(dtype)
    op = SvdLlm(keep=0.4).fit(weight, seen(Gram, x, precision))
    best = SvdLlm(keep=0.4).fit(weight.double(), seen(Gram, x))
    assert op.left.dtype == op.right.dtype == dtype
    exact = best.left @ best.right
    rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert (op.left.double() @ op.right.double() - exact).norm() < rounding * exact.norm()


@pytest.mark.parametrize("keep", [0.1, 0.9])
@pytest.mark.parametrize("rank_of_weight", [0, 1, 3])
def test_weights_of_low_rank_stay_what_they_are(rank_of_weight, keep):
    left, x = problem(24, rank_of_weight or 1)[0], problem()[1]
    weight = left @ problem(rank_of_weight or 1, 32)[0] * bool(rank_of_weight)
    op = SvdLlm(keep=keep).fit(weight, seen(Gram, x))
    assert op.to_dense().isfinite().all()
    if op.rank >= rank_of_weight:
        torch.testing.assert_close(op.to_dense(), weight, rtol=1e-8, atol=1e-9)


X = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
W = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
NAN = torch.full((1, 32), float("nan"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SvdLlm(keep=0.5, ratio=0.5), r"ratio\n\s+Extra inputs are not permitted"),
        (lambda: SvdLlm(), r"keep\n\s+Field required"),
        (lambda: SvdLlm(keep=0.5, ridge=-1), r"greater than or equal to 0"),
        (lambda: SvdLlm(keep=0.5, ridge=float("inf")), r"finite number"),
        (
            lambda: SvdLlm(keep=0.01).empty(64, 128),
            r"SvdLlm: keep=0\.01 leaves no rank for a 64x128 layer; the smallest usable keep is 0\.0235\.",
        ),
        (
            lambda: SvdLlm(keep=1).empty(9, 1),
            r"SvdLlm: rank 1 of a 9x1 layer stores 10 numbers, the dense weight 9; leave this layer dense\.",
        ),
        (lambda: SvdLlm(keep=0.5).fit(W, {Gram: Gram(32)}), r"Gram: no tokens were seen"),
        (
            lambda: SvdLlm(keep=0.5).fit(W, seen(Gram, 0 * X)),
            r"the calibration inputs are all zero, so they do not say which directions matter; use svd or zero here",
        ),
        (lambda: SvdLlm(keep=0.5).fit(W, seen(Gram, NAN)), r"the calibration inputs hold NaN or infinite values"),
        (lambda: SvdLlm(keep=0.5).fit(W / 0, seen(Gram, X)), r"the weight holds NaN or infinite values"),
        (
            lambda: SvdLlm(keep=0.5, update=True).fit(W, {**seen(DenseGram, X), **seen(PropagatedGram, 0 * X)}),
            r"the calibration inputs are all zero",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
