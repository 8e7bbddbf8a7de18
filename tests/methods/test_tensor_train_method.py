"""The method of tensor trains: its counts, the fit to the outputs, budgets, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tensormix.fitting.kronecker_scales import mode_scales, scaled, unscaled
from tensormix.fitting.output_error import output_error
from tensormix.methods import TensorTrainMethod
from tensormix.operators import TensorTrain
from tensormix.operators.tensor_train import largest_ranks, mode_factors, tt_svd
from tensormix.statistics import Gram

DOUBLE = {"dtype": torch.float64}


def problem(seed=0, O=40, I=48):
    """A weight and the Gram matrix of inputs with a few strong directions and a feature that is always zero."""
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, I, generator=drawn, **DOUBLE) @ torch.randn(I, I, generator=drawn, **DOUBLE)
    inputs = inputs * torch.logspace(0, -2, I, **DOUBLE)
    inputs[:, 5] = 0
    gram = Gram(I)
    gram.update(inputs)
    return torch.randn(O, I, generator=drawn, **DOUBLE), gram


def error(op, weight, gram):
    return output_error(weight - op.to_dense().detach(), gram.mean)


def test_the_published_count_comes_out():
    op = TensorTrainMethod(rank=64).empty(4096, 11008)
    assert op.num_params == TensorTrainMethod(rank=64).empty(11008, 4096).num_params == 113_108
    assert TensorTrainMethod(rank=64).empty(4096, 4096).ranks == [4, 16, *[64] * 7, 16, 4]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [2, 6])
def test_fitted_to_the_outputs_it_is_better_there_than_plain_and_cores_better_than_the_start(seed, rank):
    weight, gram = problem(seed)
    method = TensorTrainMethod(rank=rank, modes=3, weighted=True)
    plain = error(TensorTrainMethod(rank=rank, modes=3).fit(weight, {}), weight, gram)
    start = error(method.model_copy(update={"steps": 0}).fit(weight, {Gram: gram}), weight, gram)
    fitted, facts = method.fit_with_facts(weight, {Gram: gram})
    assert error(fitted, weight, gram) < start <= plain
    whole = output_error(weight, gram.mean)
    assert facts["output_error"] == pytest.approx((error(fitted, weight, gram) / whole) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("modes", [{"out_modes": (8, 5), "in_modes": (6, 8)}, {"modes": 4}])
def test_where_inputs_are_a_kronecker_product_the_closed_form_has_the_bound_of_tt_svd(modes):
    """Of two modes it is the optimum: the singular values of the scaled unfolding that are cut off."""
    weight, _ = problem()
    method = TensorTrainMethod(rank=7, **modes)
    into = method.modes_at(48, 40)[1]
    factors = [torch.randn(i, i, generator=torch.Generator().manual_seed(i), **DOUBLE) for i in into]
    gram = torch.eye(1, **DOUBLE)
    for factor in factors:
        gram = torch.kron(gram, factor @ factor.T + 0.1 * torch.eye(len(factor), **DOUBLE))
    scales = mode_scales(gram, into)
    sizes = method.train_sizes(48, 40)
    cores, cut = tt_svd(scaled(weight, scales), **sizes)
    op = TensorTrain.from_cores(weight, unscaled(cores, scales))
    # The scales are those of the Gram matrix up to one number and a ridge of a thousandth.
    ratio = float(gram.trace()) / 48
    assert error_of(op, weight, gram) <= ratio * cut * 1.001
    if len(into) == 2:
        assert error_of(op, weight, gram) == pytest.approx(ratio * cut, rel=0.02)
    plain = TensorTrain.from_dense(weight, **sizes)
    assert error_of(op, weight, gram) < error_of(plain, weight, gram)


def error_of(op, weight, gram):
    return output_error(weight - op.to_dense().detach(), gram)


def test_scales_are_undone_in_the_cores():
    weight, gram = problem()
    modes = {"out_modes": mode_factors(40, 3), "in_modes": mode_factors(48, 3)}
    scales = mode_scales(gram.mean, modes["in_modes"])
    whole = torch.eye(1, **DOUBLE)
    for scale in scales:
        whole = torch.kron(whole, scale)
    torch.testing.assert_close(scaled(weight, scales), weight @ whole)
    cores, _ = tt_svd(weight @ whole, **modes, ranks=largest_ranks(**modes))
    op = TensorTrain.from_cores(weight, unscaled(cores, scales))
    torch.testing.assert_close(op.to_dense().detach(), weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("O", "I"), [(576, 1536), (192, 576), (80, 42), (11008, 4096)])
def test_keep_is_spent_and_not_exceeded(O, I):
    sizes = TensorTrainMethod(keep=1.0).allowed_sizes(I, O)
    counts = [TensorTrainMethod(keep=keep).empty(I, O).num_params for keep in sizes]
    assert len(sizes) > 5 and counts == sorted(set(counts))
    assert all(count <= keep * O * I + 1e-6 for keep, count in zip(sizes, counts, strict=True))
    assert TensorTrainMethod(keep=1.0).empty(I, O).num_params == counts[-1]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"keep": 0.001}, ("keep=0.001 leaves no rank", "48x40", "smallest usable keep is 0.01875")),
        ({"rank": 21, "modes": 3}, ("rank 21", "no bond can have more than 20", "largest usable rank is 16")),
        ({"rank": 17, "modes": 3}, ("rank 17", "more numbers than the dense weight", "largest usable rank is 16")),
        ({"rank": 2, "out_modes": (5, 7), "in_modes": (6, 8)}, ("out_modes [5, 7]", "multiply to 40", "[5, 8]")),
        ({"rank": 2, "out_modes": (5, 8), "in_modes": (6, 9)}, ("in_modes [6, 9]", "multiply to 48", "[6, 8]")),
    ],
)
def test_layers_that_do_not_allow_it_name_what_would_do(settings, parts):
    with pytest.raises(ValueError) as caught:
        TensorTrainMethod(**settings).empty(48, 40)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, "either keep .* or rank, got none"),
        ({"keep": 0.5, "rank": 2}, "either keep .* or rank, got both"),
        ({"rank": 2, "in_modes": (2, 3)}, "are pairs; write out both"),
    ],
)
def test_settings_that_contradict_are_refused(settings, parts):
    with pytest.raises(ValueError, match=parts):
        TensorTrainMethod(**settings)


def test_a_layer_too_small_for_any_train_stays_dense():
    with pytest.raises(ValueError, match=r"rank 1 of a 2x3 layer stores .* leave it dense"):
        TensorTrainMethod(keep=1.0, modes=3).empty(2, 3)


def test_inputs_of_zeros_say_nothing():
    seen = Gram(48)
    seen.update(torch.zeros(5, 48))
    with pytest.raises(ValueError, match="all zero"):
        TensorTrainMethod(rank=2, modes=3, weighted=True).fit(torch.randn(40, 48), {Gram: seen})
