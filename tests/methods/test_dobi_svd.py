from __future__ import annotations

import pytest
import torch

from tensormix.fitting.soft_truncation import soft_truncation
from tensormix.methods import Coala, DobiSvd, Rtn, Svd
from tensormix.statistics import Gram, QRFactor


def seen(x):  # (N, I)
    stats = {kind: kind(x.shape[1]) for kind in (Gram, QRFactor)}
    for statistic in stats.values():
        for batch in x.split(7):
            statistic.update(batch)
    return stats


def problem(O=24, I=32, num_tokens=100):
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, I, dtype=torch.float64)
    weight, x = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((O, I), (num_tokens, I)))
    return weight, x * scales


def incremental_pca(batches, rank):  # (N, O) each -> (O, R)
    """Not centred: what was kept so far and the new batch, cut off after each (Ross et al. 2008, without the mean)."""
    kept = batches[0][:0]
    for batch in batches:
        _, s, vh = torch.linalg.svd(torch.cat([kept, batch]), full_matrices=False)
        kept = s[:rank, None] * vh[:rank]
    return torch.linalg.svd(kept, full_matrices=False).Vh.T


@pytest.mark.parametrize("num_tokens", [100, 20])
def test_both_kinds_of_pca_agree_and_are_the_optimum(num_tokens):
    weight, x = problem(num_tokens=num_tokens)
    stats = seen(x)
    closed = DobiSvd(rank=6).fit(weight, stats).to_dense().detach()
    by_batches = DobiSvd(rank=6, pca="incremental").fit(weight, stats).to_dense().detach()
    torch.testing.assert_close(by_batches, closed, rtol=1e-7, atol=1e-8)
    error = (x @ (closed - weight).T).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(x @ weight.T)[6:].norm(), rtol=1e-7, atol=1e-9)
    v = torch.linalg.eigh(weight @ (x.T @ x) @ weight.T).eigenvectors[:, -6:]  # W' = V V^T W, as it is written
    torch.testing.assert_close(closed, v @ v.T @ weight, rtol=1e-6, atol=1e-8)


def test_an_incremental_pca_of_the_outputs_spans_the_same():
    """Of outputs that lie in few directions, cutting off after every batch loses nothing: the same projection."""
    weight, x = problem()
    x = x[:, :6] @ torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = DobiSvd(rank=6, pca="incremental").fit(weight, seen(x)).to_dense().detach()
    v = incremental_pca((x @ weight.T).split(10), 6)
    torch.testing.assert_close(x @ (v @ v.T @ weight).T, x @ ours.T, rtol=1e-8, atol=1e-8)
    closed = DobiSvd(rank=6).fit(weight, seen(x)).to_dense().detach()
    torch.testing.assert_close(x @ closed.T, x @ ours.T, rtol=1e-6, atol=1e-6)


def test_remapped_keeps_more_ranks_for_the_same_bits_and_is_nearer():
    """A weight of slowly falling spectrum: ranks are worth more than bits of each number."""
    weight, x = problem()
    weight, stats = weight.bfloat16(), seen(x)
    plain, remapped = (DobiSvd(keep=0.5, storage=s).fit(weight, stats) for s in ("plain", "remapped"))
    assert remapped.num_bits <= 0.5 * 16 * weight.numel() and plain.num_bits <= 0.5 * 16 * weight.numel()
    assert (plain.rank, remapped.rank) == (6, 11)
    assert remapped.num_bits + 16 * 32 + 32 > 0.5 * 16 * weight.numel()  # one more would not fit

    def error(op):
        return (x @ (op.to_dense().double() - weight.double()).T).norm()

    assert error(remapped) < 0.6 * error(plain)


def test_it_equals_coala_at_its_rank_and_beats_the_plain_svd():
    weight, x = problem()
    op, coala = DobiSvd(keep=0.5).fit(weight, seen(x)), Coala(keep=0.5).fit(weight, seen(x))
    assert op.rank == coala.rank
    torch.testing.assert_close(op.to_dense(), coala.to_dense(), rtol=1e-7, atol=1e-8)
    plain = Svd(keep=0.5).fit(weight, {})
    assert (x @ (op.to_dense() - weight).T).norm() < 0.7 * (x @ (plain.to_dense() - weight).T).norm()


def test_its_integers_are_not_rounded_again():
    with pytest.raises(ValueError, match="is quantized already"):
        Rtn(bits=4, of=DobiSvd(rank=2, storage="remapped")).empty(32, 24)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_the_gradients_of_the_truncation(shape):
    """Against finite differences, for the matrix and for the position."""
    torch.manual_seed(0)
    matrix = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    position = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, p: soft_truncation(m, p, 2.0), (matrix, position))


def test_at_a_whole_position_it_is_the_truncated_svd():
    matrix = problem(6, 9)[0]
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    cut = soft_truncation(matrix, torch.tensor(4.0), 50.0)
    torch.testing.assert_close(cut, (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "spectrum", [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.9999, 0.5], [2.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4]
)
def test_gradients_stay_bounded_where_singular_values_meet(spectrum):
    """The gradient of a plain SVD divides by the difference of their squares."""
    q, p = (torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(n))).Q for n in (1, 2))
    matrix = (q @ torch.tensor(spectrum).diag() @ p).requires_grad_()
    position = torch.tensor(2.0, requires_grad=True)
    torch.autograd.backward(soft_truncation(matrix, position, 10.0).square().sum() + matrix.sum() * 0)
    wanted = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    (soft_truncation(matrix, position, 10.0) * wanted).sum().backward()
    assert matrix.grad.isfinite().all() and position.grad.isfinite()
    assert matrix.grad.norm() < 30 * wanted.norm()


def test_nothing_is_lost_where_everything_stays():
    """The derivative of the identity is the identity, however close singular values are."""
    matrix = torch.eye(5, 8, dtype=torch.float64).requires_grad_()
    wanted = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (soft_truncation(matrix, torch.tensor(30.0), 2.0) * wanted).sum().backward()
    torch.testing.assert_close(matrix.grad, wanted)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DobiSvd(), r"takes either rank \(a learned one\) or keep \(a fraction\), got none of them"),
        (lambda: DobiSvd(rank=2, keep=0.5), r"got both"),
        (
            lambda: DobiSvd(rank=14).empty(32, 24),
            r"rank 14 of a 32x24 layer stores as much .* the largest rank is 13\.",
        ),
        (lambda: DobiSvd(rank=25, storage="remapped").empty(32, 24), r"remapped storage; the largest rank is 22\."),
        (lambda: DobiSvd(keep=0.01).empty(32, 24), r"DobiSvd: keep=0\.01 leaves no rank"),
        (
            lambda: DobiSvd(keep=0.01, storage="remapped").empty(32, 24),
            r"keep=0\.01 leaves no rank for a 32x24 layer; the smallest usable keep is 0\.0443\.",
        ),
        (lambda: DobiSvd(rank=1, storage="remapped").empty(32, 1), "leave this layer dense"),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
