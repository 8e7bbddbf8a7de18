"""What the methods with whitened weights share, against answers that are known."""

from __future__ import annotations

import pytest
import torch

from tensormix.fitting.whitening import solved


@pytest.mark.parametrize("smallest", [1.0, 1e-4, 1e-7, 1e-12, 1e-15, 0.0])
def test_the_fast_solution_is_exact_or_not_given(smallest):
    """A direction of the inputs that is hardly there: the answer in higher precision, or none."""
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    values = torch.ones(12, dtype=torch.float64)
    values[0] = smallest
    lengths = torch.logspace(-3, 3, 12, dtype=torch.float64)
    gram = lengths[:, None] * (vectors * values @ vectors.T) * lengths
    wanted = torch.randn(5, 12, dtype=torch.float64) / lengths
    found = solved(gram, wanted @ gram)
    assert (found is None) == (smallest < 1e-8)
    if found is not None:
        torch.testing.assert_close(found * lengths, wanted * lengths, rtol=1e-6, atol=1e-6)
