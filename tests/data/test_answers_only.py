"""What recovery learns from where only answers count: their tokens alone, none from a batch without any."""

import json

import pytest
import torch
from torch.nn import functional as F

from recovery_rows import steps_of
from tensormix.compression import compress
from tensormix.data import IGNORED, Mixture
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.settings import Recover, Source

PLAN = Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}])
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    """A compressed model, a tokenizer that speaks, and conversations whose questions fill windows of their own."""
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny))
    compress(model, PLAN)
    tokenizer.chat_template = TEMPLATE
    lines = [{"q": " ".join(str(i * n) for n in range(30)), "a": f"the last is {i * 29}"} for i in range(1, 9)]
    file = tmp_path_factory.mktemp("talks") / "talks.json"
    file.write_text(json.dumps(lines))
    source = Source(file=str(file), chat={"user": "q", "assistant": "a"})
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def run(folder, **changes):
        model.load_state_dict(start)
        base = {"text": [source], "steps": 1, "batch_size": 4, "window": 16, "learning_rate": 1e-3}
        wanted = Recover.model_validate(base | {"loss_on": "answers"} | changes)
        rows = recover(
            model, tokenizer, wanted, folder=folder / "c", seed=0, teacher=str(tiny), cache=folder / "logits"
        )
        return steps_of(rows), Mixture(
            tokenizer,
            wanted.text,
            window=wanted.window,
            num_windows=wanted.steps * wanted.batch_size,
            seed=0,
            answers_only=wanted.loss_on == "answers",
            num_held_out=wanted.held_out.num_windows,
        )

    def logits(mixture):
        """Of the start and of the dense model, with the labels of what follows."""
        model.load_state_dict(start)
        ids = torch.stack([window["input_ids"] for window in mixture])
        with torch.no_grad():
            ours, theirs = (m(ids).logits[:, :-1] for m in (model, load_model(str(tiny), dtype="float32")))
        return ours, theirs, torch.stack([window["labels"] for window in mixture])[:, 1:]

    return run, logits


def test_the_loss_on_the_text_is_that_of_the_answers(asked, tmp_path):
    run, logits = asked
    rows, mixture = run(tmp_path)
    ours, _, labels = logits(mixture)
    which = labels != IGNORED
    assert 0 < which.sum() < which.numel() / 2
    assert rows[0]["loss"] == pytest.approx(F.cross_entropy(ours[which], labels[which]).item(), rel=1e-4)


def test_the_loss_on_the_dense_model_is_that_of_the_answers(asked, tmp_path):
    run, logits = asked
    rows, mixture = run(tmp_path, loss="kl", distill={"top_k": 512})
    ours, theirs, labels = logits(mixture)
    which = labels != IGNORED
    expected = F.kl_div(ours[which].log_softmax(-1), theirs[which].log_softmax(-1), log_target=True, reduction="none")
    assert rows[0]["loss"] == pytest.approx(expected.sum(-1).mean().item(), rel=5e-3)  # kept in fp16


def test_logits_of_other_windows_lie_in_another_folder(asked, tmp_path):
    run, _ = asked
    windows = [run(tmp_path, loss="kl", loss_on=loss_on)[1] for loss_on in ("all", "answers", "all")]
    first = [torch.stack([window["input_ids"] for window in mixture]) for mixture in windows]
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert len(list((tmp_path / "logits").iterdir())) == 2


@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_a_batch_without_an_answer_is_a_number_and_makes_no_other_loss_look_high(asked, tmp_path, loss):
    run, _ = asked
    exam = {"text": [{"exam": True}], "window": 48, "batch_size": 1, "steps": 8, "loss": loss}
    rows, mixture = run(tmp_path, **exam)
    empty = [bool((window["labels"][1:] == IGNORED).all()) for window in mixture]
    assert any(empty) and not all(empty)
    assert [row["loss"] == 0 for row in rows] == empty
