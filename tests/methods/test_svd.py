from __future__ import annotations

import pytest
import torch

from tensormix.methods import Svd


def test_it_reaches_the_known_optimum():
    weight = torch.randn(24, 32)
    op = Svd(keep=0.4).fit(weight, {})
    tail = torch.linalg.svdvals(weight)[op.rank :].norm()
    torch.testing.assert_close((op.to_dense() - weight).norm(), tail, rtol=1e-4, atol=0)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (30, 70)])
def test_the_rank_is_the_largest_that_keep_allows(keep, shape):
    out_features, in_features = shape
    dense = out_features * in_features
    rank = Svd(keep=keep).rank(in_features, out_features)
    assert rank * sum(shape) <= keep * dense + 1e-6 < (rank + 1) * sum(shape)
    assert Svd(keep=keep).empty(in_features, out_features).num_params == rank * sum(shape)


def test_the_smallest_usable_keep_that_the_error_names_is_usable():
    with pytest.raises(ValueError, match=r"smallest usable keep is 0\.0477"):
        Svd(keep=0.04).empty(70, 30)
    assert Svd(keep=0.0477).empty(70, 30).rank == 1


def test_keep_is_not_lost_to_rounding():
    """0.3 * 100 * 100 / 200 is 14.999999999999998 or 15 in fp64, depending on the order."""
    assert Svd(keep=0.3).rank(100, 100) == 15
    assert Svd(keep=0.29).rank(200, 200) == 29
