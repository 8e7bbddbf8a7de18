"""The losses of recovery: exact where nothing is left out, a bound where something is, finite always."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensormix.recover.losses import relative_distance, top_k_divergence, top_k_of


def both(vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, 5, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))


def exact(teacher, student):
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


def kept(logits, top_k):
    """What `top_k_of` keeps, without rounding."""
    values, tokens = logits.log_softmax(-1).topk(top_k)
    return tokens, values, 1 - values.exp().sum(-1)


@given(vocabulary=st.integers(2, 40), seed=st.integers(0, 99))
def test_with_the_whole_vocabulary_it_is_the_exact_divergence(vocabulary, seed):
    teacher, student = both(vocabulary, seed)
    found = top_k_divergence(student, *kept(teacher, vocabulary))
    torch.testing.assert_close(found, exact(teacher, student).float(), rtol=1e-4, atol=1e-5)


@given(vocabulary=st.integers(3, 40), seed=st.integers(0, 99), data=st.data())
def test_fewer_tokens_bound_it_from_below_and_more_of_them_bound_it_better(vocabulary, seed, data):
    top_k = data.draw(st.integers(1, vocabulary - 1))
    teacher, student = both(vocabulary, seed)
    fewer, more = (top_k_divergence(student, *kept(teacher, k)) for k in (top_k, top_k + 1))
    assert (fewer >= -1e-5).all()
    assert (fewer <= more + 1e-5).all()
    assert (more <= exact(teacher, student) + 1e-5).all()


def test_its_gradient_is_the_difference_of_the_distributions_where_nothing_is_left_out():
    teacher, student = both(7, 0)
    student.requires_grad_(True)
    top_k_divergence(student, *kept(teacher, 7)).sum().backward()
    torch.testing.assert_close(student.grad, student.softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-5)


def test_what_is_kept_is_a_distribution_also_after_rounding():
    tokens, values, tail = top_k_of(20 * torch.randn(64, 500), 8)
    assert values.dtype == torch.float16
    assert (tail >= 0).all()
    torch.testing.assert_close(
        values.double().exp().sum(-1) + tail.double(), torch.ones(64).double(), atol=1e-3, rtol=0
    )
    assert tokens.shape == (64, 8)


def test_a_certain_teacher_gives_finite_gradients():
    logits = torch.full((1, 9), -1e4)
    logits[0, 3] = 0
    student = torch.randn(1, 9, requires_grad=True)
    loss = top_k_divergence(student, *top_k_of(logits, 2)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(-student.log_softmax(-1)[0, 3].item(), abs=1e-5)
    assert student.grad.isfinite().all()


def test_the_distance_of_residual_streams_is_relative():
    states = [torch.randn(2, 3, 4) for _ in range(2)]
    assert relative_distance(states, states) == 0
    assert relative_distance([0 * s for s in states], states).item() == pytest.approx(1)
