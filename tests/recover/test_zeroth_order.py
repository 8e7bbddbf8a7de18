"""The estimate without gradients is the gradient in expectation, and depends on nothing but seed, step and text."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recovery_rows import steps_of
from tensormix.compression import compress
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.recover.trainer import DistillTrainer
from tensormix.recover.zeroth_order import ZerothOrderDescent, num_queries
from tensormix.settings import Lora, Recover, Source, ZerothOrder

PLAN = Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}])


def settings(**changes):
    base = {"text": [Source(exam=True)], "steps": 6, "batch_size": 2, "window": 32, "learning_rate": 1e-3}
    base |= {"parameters": "lora", "lora": Lora(form="tt_lora", rank=3, alpha=6), "held_out": {"num_windows": 0}}
    return Recover(**base | {"gradient": "zeroth_order", "zeroth_order": {"queries": 2}} | changes)


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Quadratic:
    """L(w) = w A w / 2 + b w of two parameters together, in fp64."""

    def __init__(self, queries, seed=0, units=(1.0, 1.0)):
        random = torch.Generator().manual_seed(1)
        root = torch.randn(6, 6, generator=random, dtype=torch.float64)
        self.A, self.b = root @ root.T, torch.randn(6, generator=random, dtype=torch.float64)
        first, second = torch.randn(2, 2, generator=random), torch.randn(2, generator=random)
        self.parameters = [nn.Parameter(value.double()) for value in (first, second)]
        groups = [{"params": [p], "lr": unit} for p, unit in zip(self.parameters, units, strict=True)]
        self.descent = ZerothOrderDescent(groups, 1.0, 0.0, ZerothOrder(queries=queries), seed)

    @property
    def w(self):
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @property
    def gradient(self):
        return self.A @ self.w + self.b

    def loss(self):
        w = self.w
        return w @ self.A @ w / 2 + self.b @ w

    def estimate(self, step=0):
        """What a step of rate 1 takes off, with the parameters back where they were."""
        before = self.w
        self.descent.ask(self.loss, step)
        assert torch.allclose(self.w, before, rtol=0, atol=1e-12)
        self.descent.step()
        moved = before - self.w
        with torch.no_grad():
            self.parameters[0].copy_(before[:4].view(2, 2))
            self.parameters[1].copy_(before[4:])
        return moved


def test_the_mean_of_many_queries_is_the_gradient_of_a_quadratic():
    problem = Quadratic(queries=4000)
    error = (problem.estimate() - problem.gradient).norm() / problem.gradient.norm()
    assert error < 4 * (7 / 4000) ** 0.5  # four standard deviations


@pytest.mark.parametrize("queries", [1, 5])
def test_its_squared_error_is_that_of_the_theorem(queries):
    """(n + 1) / Q times the squared gradient: neighbouring steps are independent, and so are queries."""
    problem = Quadratic(queries)
    wanted = problem.gradient
    errors = torch.stack([(problem.estimate(step) - wanted).square().sum() for step in range(600)])
    assert float(errors.mean() / wanted.square().sum()) == pytest.approx(7 / queries, rel=0.2)


def test_a_group_of_another_rate_is_estimated_in_its_own_unit():
    """As descent on w / unit, at the plain rate: a step along the gradient times the squared unit."""
    problem = Quadratic(queries=4000, units=(1.0, 3.0))
    wanted = problem.gradient * torch.tensor([1.0] * 4 + [9.0] * 2, dtype=torch.float64)
    assert (problem.estimate() - wanted).norm() / wanted.norm() < 0.2


def test_the_same_seed_and_step_ask_the_same_directions_and_others_do_not():
    one, same, other = (Quadratic(3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.estimate(4), same.estimate(4))
    assert not torch.equal(one.estimate(4), one.estimate(5))
    assert not torch.equal(one.estimate(4), other.estimate(4))


def test_batches_of_a_step_add_up_and_ask_directions_of_their_own():
    problem = Quadratic(2)
    before = problem.w
    for _ in range(2):
        problem.descent.ask(lambda: problem.loss() / 2, 0)
    assert len(set(seed for seed, _ in problem.descent._found)) == 4
    problem.descent.step()
    four = Quadratic(4)
    torch.testing.assert_close(before - problem.w, four.estimate())


def test_what_is_frozen_is_not_moved():
    problem = Quadratic(3)
    problem.parameters[0].requires_grad_(False)
    moved = problem.estimate()
    assert not moved[:4].any() and moved[4:].all()


def test_queries_grow_to_their_limit():
    growing = ZerothOrder(queries=2, growth=0.5, most_queries=5)
    assert [num_queries(growing, step) for step in (0, 1, 3, 8, 100)] == [2, 2, 4, 5, 5]


@pytest.mark.parametrize(("accepts", "share"), [(True, 1), (False, 4)])
def test_a_batch_has_its_share_of_the_step_and_is_asked_without_dropout_or_a_graph(accepts, share):
    """A model that is told how many tokens the step has divides by them itself."""
    problem, model, seen = Quadratic(2), nn.Dropout(), []

    def loss(model, inputs, num_items_in_batch):
        seen.append((model.training, torch.is_grad_enabled()))
        return problem.loss()

    trainer = SimpleNamespace(
        descent=problem.descent,
        model_accepts_loss_kwargs=accepts,
        args=SimpleNamespace(gradient_accumulation_steps=4),
        state=SimpleNamespace(global_step=0),
        _prepare_inputs=lambda inputs: inputs,
        compute_loss_context_manager=nullcontext,
        compute_loss=loss,
    )
    found = DistillTrainer.training_step(trainer, model.train(), {}, num_items_in_batch=torch.tensor(7))
    whole = Quadratic(2)
    torch.testing.assert_close(found, whole.descent.ask(whole.loss, 0) / share)
    assert seen == [(False, False)] * 4


# ---- in a recovery


def load(tiny):
    model = load_model(str(tiny), dtype="float32")
    compress(model, PLAN)
    return model


class Stopped(Exception):
    pass


def run(model, tiny, folder, wanted, stop_at=None):
    def progress(done, _total):
        if done == stop_at:
            raise Stopped

    return recover(
        model, load_tokenizer(str(tiny)), wanted, folder=folder, seed=0, progress=progress, teacher=str(tiny)
    )


def test_patches_learn_without_gradients_and_nothing_else_changes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a gradient was asked for"))
    model = load(tiny)
    before = copy.deepcopy(model)
    wanted = settings(
        steps=12,
        learning_rate=0.1,
        schedule="constant",
        lora={"rank": 3, "alpha": 6},
        zeroth_order={"queries": 4},
        held_out={"num_windows": 4, "num_times": 4},
    )
    rows = run(model, tiny, tmp_path / "c", wanted)
    losses = [row["loss"] for row in rows if row["kind"] == "held_out"]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = state(model)
    for name, value in before.state_dict().items():
        found = after.get(name)
        if found is None or found.shape != value.shape:
            site, _, rest = name.rpartition(".")
            found = after[f"{site}.terms.0.{rest}"]
        assert torch.equal(found, value)


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "zeroth_order": {"queries": 1, "growth": 0.5}}])
def test_a_stopped_run_ends_in_the_same_model_to_the_bit(changes, tiny, tmp_path):
    wanted = settings(steps=7, save_every=3, **changes)
    whole, cut = load(tiny), load(tiny)
    rows = run(whole, tiny, tmp_path / "whole", wanted)
    with pytest.raises(Stopped):
        run(cut, tiny, tmp_path / "cut", wanted, stop_at=5)
    cut = load(tiny)
    again = run(cut, tiny, tmp_path / "cut", wanted)
    assert all(torch.equal(value, state(cut)[name]) for name, value in state(whole).items())
    assert [row["loss"] for row in steps_of(rows)] == [row["loss"] for row in steps_of(again)]


@pytest.mark.parametrize("changes", [{"parameters": "compressed"}, {"parameters": "all", "loss": "kl"}])
def test_any_parameters_and_a_teacher_can_be_learned_from(changes, tiny, tmp_path):
    model = load(tiny)
    before = state(model)
    rows = run(model, tiny, tmp_path / "c", settings(steps=2, **changes))
    assert [row["step"] for row in steps_of(rows)] == [1, 2]
    assert any(not torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": "auto"}, "needs a number as learning_rate: auto looks at gradients"),
        ({"loss": "local_then_kl", "parameters": "all", "steps": 200}, "take the loss lm or kl"),
        ({"recompute": True}, "with gradient zeroth_order leave it out"),
        ({"zeroth_order": {"queries": 8, "most_queries": 4}}, r"most_queries \(4\) must be at least queries \(8\)"),
        ({"zeroth_order": {"queries": 0}}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together(changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        settings(**changes)
