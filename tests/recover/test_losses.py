"""The losses of recovery: exact where nothing is left out, unbiased where something is, finite always."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensormix.recover.losses import Kept, divergence, keep, kept_divergence, relative_distance


def both(vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, 5, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))


def exact(teacher, student):
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


@given(vocabulary=st.integers(2, 40), seed=st.integers(0, 99))
def test_with_the_whole_vocabulary_it_is_the_exact_divergence(vocabulary, seed):
    teacher, student = both(vocabulary, seed)
    wanted = exact(teacher, student).float()
    torch.testing.assert_close(divergence(student, teacher), wanted, rtol=1e-4, atol=1e-5)
    found = kept_divergence(student, keep(teacher, vocabulary, 4, seed))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)  # fp16


@pytest.mark.parametrize("top_k", (1, 8, 32))
def test_value_and_gradient_are_unbiased_on_a_real_vocabulary(top_k):
    """Over many draws both are those of a direct computation, within what the draws themselves scatter."""
    generator = torch.Generator().manual_seed(0)
    teacher = 2.5 * torch.randn(4, 49_152, generator=generator)
    student = (teacher + torch.randn(4, 49_152, generator=generator)).requires_grad_(True)
    directions = torch.randn(6, 49_152, generator=generator)

    def measured(loss):
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        return torch.cat([loss.detach(), (gradient @ directions.T).flatten()]).double()

    wanted = measured(divergence(student, teacher))
    found = torch.stack([measured(kept_divergence(student, keep(teacher, top_k, 32, seed))) for seed in range(40)])
    scatter = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() < 5 * scatter + 2e-3 * wanted.abs()).all()


def test_its_gradient_is_the_difference_of_the_distributions_where_nothing_is_left_out():
    teacher, student = both(7, 0)
    student.requires_grad_(True)
    kept_divergence(student, keep(teacher, 7, 4, 0)).sum().backward()
    torch.testing.assert_close(student.grad, student.softmax(-1) - teacher.softmax(-1), rtol=2e-2, atol=1e-3)


def test_it_sees_how_the_mass_of_the_rare_tokens_is_divided():
    """Two students with the same probabilities of the kept tokens, and so of all others together; one of them has
    the others in another order. As one event the others cannot tell them apart."""
    teacher = torch.linspace(3, -3, 400)[None]
    wrong = torch.cat([teacher[:, :8], teacher[:, 8:].flip(-1)], dim=-1)
    right, forgetful = (
        torch.stack([kept_divergence(student, keep(teacher, 8, 32, seed)) for seed in range(30)]).mean()
        for student in (teacher, wrong)
    )
    assert abs(right) < 0.05 * forgetful
    assert forgetful.item() == pytest.approx(divergence(wrong, teacher).item(), rel=0.05)


def test_what_is_kept_is_a_distribution_also_after_rounding():
    kept = keep(20 * torch.randn(64, 500), 8, 5, 0)
    assert kept.values.dtype == kept.drawn_values.dtype == torch.float16
    assert (kept.tail >= 0).all()
    total = kept.values.double().exp().sum(-1) + kept.tail.double()
    torch.testing.assert_close(total, torch.ones(64).double(), atol=1e-3, rtol=0)
    assert kept.tokens.shape == (64, 8) and kept.drawn.shape == (64, 5)


@given(vocabulary=st.integers(3, 60), seed=st.integers(0, 99), data=st.data())
def test_only_what_is_not_kept_exactly_is_drawn_and_as_often_as_it_should(vocabulary, seed, data):
    """Systematic draws: each token comes within one of its expected number."""
    top_k, count = data.draw(st.integers(1, vocabulary - 1)), data.draw(st.integers(1, 50))
    teacher, _ = both(vocabulary, seed)
    kept = keep(teacher, top_k, count, seed)
    rest = teacher.softmax(-1).scatter(-1, kept.tokens.long(), 0.0)
    expected = count * rest / rest.sum(-1, keepdim=True)
    times = torch.zeros_like(rest).scatter_add(-1, kept.drawn.long(), torch.ones_like(kept.drawn, dtype=rest.dtype))
    assert ((times - expected).abs() < 1 + 1e-3).all()
    assert (times.gather(-1, kept.tokens.long()) == 0).all()


def test_a_certain_teacher_gives_finite_gradients():
    logits = torch.full((1, 9), -1e5)
    logits[0, 3] = 0
    student = torch.randn(1, 9, requires_grad=True)
    loss = kept_divergence(student, keep(logits, 2, 4, 0)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(-student.log_softmax(-1)[0, 3].item(), abs=1e-5)
    assert student.grad.isfinite().all()


def test_the_parts_of_what_is_kept_can_be_stacked():
    teacher, _ = both(12, 0)
    alone = [keep(teacher[i], 3, 2, seed=0) for i in range(2)]
    stacked = Kept(*(torch.stack([getattr(kept, name) for kept in alone]) for name in Kept._fields))
    assert kept_divergence(teacher, stacked).shape == (2, 5)


def test_the_distance_of_residual_streams_is_relative():
    states = [torch.randn(2, 3, 4) for _ in range(2)]
    assert relative_distance(states, states) == 0
    assert relative_distance([0 * s for s in states], states).item() == pytest.approx(1)
