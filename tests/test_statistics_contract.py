from __future__ import annotations

import pytest
import torch

from tensormix.statistics import Gram, InputMean

STATISTICS = [InputMean, Gram]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_batches_may_be_cut_anywhere(statistic, dtype):
    """A statistic is a sum over tokens: the parts must give what the whole gives, up to the rounding of fp64."""
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 8) * 100).to(dtype)
    whole, parts = statistic(8), statistic(8)
    whole.update(x)
    parts.update(x[:2])
    parts.update(x[2:2])
    parts.update(x[2])
    parts.update(x[3:].reshape(-1, 8)[:1])
    parts.update(x[3:].reshape(-1, 8)[1:])
    assert parts.num_tokens == whole.num_tokens == 30
    assert whole.sum.dtype == torch.float64
    torch.testing.assert_close(parts.sum, whole.sum, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(parts.mean, whole.sum / 30, rtol=1e-12, atol=1e-10)


def test_they_are_what_their_names_say():
    x = torch.randn(7, 8)
    mean, gram = InputMean(8), Gram(8)
    mean.update(x)
    gram.update(x)
    torch.testing.assert_close(mean.mean, x.double().mean(0))
    torch.testing.assert_close(gram.sum, x.double().T @ x.double())


def test_many_small_numbers_are_not_lost_beside_a_large_one():
    """In fp32 adding 1 to 2^25 changes nothing."""
    mean = InputMean(1)
    mean.update(torch.tensor([[2.0**25]]))
    for _ in range(10):
        mean.update(torch.ones(1, 1))
    assert mean.sum.item() == 2**25 + 10


@pytest.mark.parametrize("statistic", STATISTICS)
def test_inputs_with_gradients_leave_no_graph_behind(statistic):
    seen = statistic(3)
    seen.update(torch.ones(2, 3, requires_grad=True))
    assert not seen.sum.requires_grad


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_tokens_is_an_error(statistic):
    with pytest.raises(ValueError, match=rf"{statistic.__name__}: no tokens were seen"):
        _ = statistic(3).mean
