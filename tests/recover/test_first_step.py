"""The learning rate that a model bears is told from its gradients: the first step of Adam keeps what it promises."""

import pytest
import torch
from torch import nn

from tensormix.recover.first_step import PROMISE, largest_rate, loss_per_rate, warning


class Quadratic(nn.Module):
    """L(w) = sum of curvature w^2 / 2, as a compressed model has it: a few directions are much steeper than others."""

    def __init__(self, curvature, start):
        super().__init__()
        self.curvature, self.w = curvature, nn.Parameter(start.clone())

    def forward(self):
        return (self.curvature * self.w.square()).sum() / 2


def quadratic(steepest, size=400):
    generator = torch.Generator().manual_seed(0)
    curvature, start = torch.ones(size).double(), torch.randn(size, generator=generator).double()
    curvature[:4], start[:4] = steepest, 0.1
    return Quadratic(curvature, start)


def factors(model, factor=1.0):
    return dict.fromkeys(model.parameters(), factor)


def test_a_tiny_first_step_lowers_the_loss_by_what_was_promised():
    model = quadratic(1000.0)
    per_rate = loss_per_rate(factors(model), iter([model()]))
    rate, before = 1e-5 * per_rate, model().item()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model().backward()
    optimizer.step()
    assert before - model().item() == pytest.approx(before * rate / per_rate, rel=0.02)


@pytest.mark.parametrize("steepest", (1.0, 100.0, 1e4))
def test_the_largest_rate_lowers_the_loss_however_steep_a_few_directions_are(steepest):
    model = quadratic(steepest)
    per_rate = loss_per_rate(factors(model), iter([model()]))
    before = model().item()
    optimizer = torch.optim.Adam(model.parameters(), lr=largest_rate(per_rate, 1.0))
    model().backward()
    optimizer.step()
    assert model().item() < before * (1 - PROMISE / 3)


def test_a_rate_that_is_right_for_one_model_is_far_too_high_for_a_steeper_one():
    flat, steep = (loss_per_rate(factors(model), iter([model()])) for model in (quadratic(1.0), quadratic(1e4)))
    model = quadratic(1e4)
    before = model().item()
    optimizer = torch.optim.Adam(model.parameters(), lr=3 * largest_rate(flat, 1.0))
    model().backward()
    optimizer.step()
    assert steep < flat and model().item() > before


def test_factors_of_a_group_count_and_gradients_are_left_as_they_were():
    model = quadratic(10.0)
    one = loss_per_rate(factors(model), iter([model(), model()]))
    assert loss_per_rate(factors(model, 4.0), iter([model()])) == pytest.approx(one / 4)
    assert model.w.grad is None


def test_where_no_loss_is_left_nothing_moves():
    model = quadratic(1.0)
    per_rate = loss_per_rate(factors(model), iter([model() - model().detach()]))
    assert largest_rate(per_rate, 1.0) == 0 and warning(1.0, per_rate) is None


def test_where_nothing_can_be_learned_any_rate_will_do():
    model = quadratic(1.0)
    per_rate = loss_per_rate(factors(model), iter([0 * model()]))
    assert largest_rate(per_rate, 0.25) == 0.25
    assert warning(1.0, per_rate) is None


def test_a_rate_that_promises_more_than_there_is_is_named_beside_one_that_does_not():
    assert warning(1e-3, 2e-3) is None
    said = warning(1e-3, 1e-4)
    assert "0.001" in said and "10 times" in said and "5e-05" in said and "auto" in said
