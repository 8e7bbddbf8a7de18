from __future__ import annotations

import pytest
import torch

from tensormix.methods import Mixt
from tensormix.operators import MixT


def test_matched_is_the_closed_form():
    weight = torch.randn(80, 48)
    fitted = Mixt(num_branches=2, bond=3, padding="power").fit(weight, {})
    expected = MixT.from_dense(weight, num_branches=2, bond=3, padding="power")
    assert torch.equal(fitted.to_dense(), expected.to_dense())


def test_zero_is_zero():
    assert not Mixt(num_branches=3, init="zero").fit(torch.randn(80, 48), {}).to_dense().any()


@pytest.mark.parametrize(
    ("shape", "padding"), [((256, 128), "multiple"), ((250, 130), "multiple"), ((200, 140), "power")]
)
def test_random_has_the_norm_of_the_dense_weight(shape, padding):
    """In expectation over seeds. ||W||^2 averages over some thousand squares of each of 20 draws."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(shape)
    norms = [
        Mixt(num_branches=3, init="random", padding=padding, seed=seed).fit(weight, {}).to_dense().square().sum()
        for seed in range(20)
    ]
    assert float(torch.stack(norms).mean().detach() / weight.square().sum()) == pytest.approx(1, rel=0.02)


def test_random_depends_on_seed_and_weight_and_on_nothing_else():
    torch.manual_seed(0)
    first, second = torch.randn(64, 64), torch.randn(64, 64)

    def draw(weight, seed=0):
        return Mixt(num_branches=3, init="random", seed=seed).fit(weight, {}).core_0.detach()

    state = torch.get_rng_state()
    value = draw(first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not be used"
    torch.manual_seed(7)
    assert torch.equal(draw(first), value)
    assert torch.equal(draw(first.T.contiguous().T), value), "the memory order is not the content"
    for other in (draw(first, seed=1), draw(second), draw(first.reshape(32, 128))):
        correlation = torch.corrcoef(torch.stack([value.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / value.numel() ** 0.5


def test_random_keeps_less_of_the_weight_than_matched():
    weight = torch.randn(64, 64)
    errors = {
        init: float((weight - Mixt(num_branches=3, init=init).fit(weight, {}).to_dense()).norm().detach())
        for init in ("matched", "zero", "random")
    }
    assert errors["matched"] < errors["zero"] < errors["random"]
