from __future__ import annotations

import pytest
import torch

from tensormix.fitting.output_error import damped, output_error


def test_it_is_the_squared_error_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    x, error = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((50, 6), (4, 6)))
    assert output_error(error, x.T @ x) == pytest.approx(float((x @ error.T).square().sum()), rel=1e-12)


def test_damping_makes_fewer_tokens_than_features_definite_in_any_unit():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 5] = 0
    gram = x.T @ x
    before = gram.clone()
    for unit in (1e-8, 1.0, 1e8):
        stable = damped(unit * gram, 0.005, 0.01)
        ridge = 0.005 * gram.diagonal().mean()
        torch.testing.assert_close(stable / unit, gram + torch.diag(0.01 * gram.diagonal() + ridge))
        assert torch.linalg.eigvalsh(stable / unit).min() > 0.99 * ridge
        assert stable[5, 5] / unit == pytest.approx(float(ridge))
    assert torch.equal(gram, before)


def test_a_gram_matrix_in_fp32_becomes_fp64():
    assert damped(torch.eye(3), 0.005, 0.01).dtype == torch.float64


@pytest.mark.parametrize(
    ("gram", "sentence"),
    [
        (torch.zeros(3, 3), r"inputs are all zero, so they do not say which weights matter; use svd or zero here"),
        (torch.full((3, 3), float("nan")), r"inputs hold NaN or infinite values"),
    ],
)
def test_inputs_that_say_nothing_are_refused(gram, sentence):
    with pytest.raises(ValueError, match=sentence):
        damped(gram, 0.005, 0.01)
