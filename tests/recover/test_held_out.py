"""A recovery is judged on windows that it never learns from, and its best state is kept."""

import math

import pytest
import torch

from tensormix.compression import compress
from tensormix.data import Mixture
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.recover.held_out import judged_steps
from tensormix.settings import Recover, Source

PLAN = Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}])


def settings(**changes):
    usual = {"text": [Source(exam=True)], "steps": 10, "batch_size": 4, "window": 48, "learning_rate": 1e-2}
    return Recover(**usual | {"held_out": {"num_windows": 6, "num_times": 5}} | changes)


@pytest.fixture
def model(tiny):
    model = load_model(str(tiny), dtype="float32")
    compress(model, PLAN)
    return model


@pytest.fixture
def recovered(model, tiny, tmp_path):
    def run(**changes):
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        rows = recover(
            model, load_tokenizer(str(tiny)), settings(**changes), folder=tmp_path / "c", seed=0, teacher=str(tiny)
        )
        held_out = [row for row in rows if row["kind"] == "held_out"]
        kept = [row for row in rows if row["kind"] == "kept"]
        return before, held_out, kept

    return run


def test_it_is_judged_at_the_start_at_intervals_and_at_the_end(recovered):
    _, held_out, (kept,) = recovered()
    assert [row["step"] for row in held_out] == [0, 2, 4, 6, 8, 10]
    assert kept["start"] == held_out[0]["loss"] and kept["end"] == held_out[-1]["loss"]
    assert kept["loss"] == min(row["loss"] for row in held_out) < kept["start"]


def test_a_recovery_that_does_harm_leaves_the_model_as_it_was_and_says_so(recovered, model):
    before, held_out, (kept,) = recovered(learning_rate=30.0, diverged=None)
    assert min(row["loss"] for row in held_out[1:]) > held_out[0]["loss"]
    assert kept["step"] == 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    said = kept["said"]
    assert f"{kept['start']:.3f}" in said and f"{kept['end']:.3f}" in said and "as it was before" in said
    assert "learning_rate" in said


def test_the_best_state_is_the_one_that_was_judged_best(recovered, model, tiny):
    """Recovered again with as many steps as the best state had, at the same rates, the model is the kept one."""
    _, _, (kept,) = recovered(learning_rate=0.3, diverged=None)
    assert 0 < kept["step"]
    windows = mixture(tiny).held_out
    with torch.no_grad():
        ids = torch.stack([window["input_ids"] for window in windows])
        labels = torch.stack([window["labels"] for window in windows])
        again = model(ids, labels=labels).loss.item()
    assert again == pytest.approx(kept["loss"], rel=1e-5)


def mixture(tiny, **changes):
    options = {"window": 48, "num_windows": 40, "seed": 0, "num_held_out": 6} | changes
    return Mixture(load_tokenizer(str(tiny)), [Source(exam=True)], **options)


def test_a_text_that_is_named_judges_too(recovered, tmp_path):
    file = tmp_path / "other.txt"
    file.write_text("What is large? A hill is large, and so is the sea. " * 40)
    alone = recovered()[1]
    both = recovered(held_out={"num_windows": 6, "num_times": 5, "text": [{"file": str(file)}]})[1]
    assert both[0]["tokens"] == alone[0]["tokens"] + 6 * 47
    assert both[0]["loss"] != alone[0]["loss"]


def test_both_texts_stand_side_by_side(recovered, tmp_path):
    """The loss of all is that of each, by its tokens; and a text that is unlike the one that is read loses."""
    file = tmp_path / "other.txt"
    file.write_text("zebra quartz jumbled vexing my fjord, waltz! " * 60)
    _, held_out, (kept,) = recovered(
        held_out={"num_windows": 6, "num_times": 1, "text": [{"file": str(file)}]}, learning_rate=3e-2, steps=20
    )
    alone = recovered(held_out={"num_windows": 6, "num_times": 1}, steps=1)[1]
    own, other = 6 * 47, held_out[0]["tokens"] - 6 * 47
    for row in held_out:
        together = (own * row["in_domain"] + other * row["elsewhere"]) / (own + other)
        assert row["loss"] == pytest.approx(together, rel=1e-6)
    assert "elsewhere" not in alone[0]
    said = kept["said"].splitlines()[-1]
    at_best = next(row for row in held_out if row["step"] == kept["step"])
    for name, label in (("in_domain", "in-domain"), ("elsewhere", "other texts")):
        before, after = (f"{math.exp(row[name]):.4g}" for row in (held_out[0], at_best))
        assert f"{label} {before} to {after}" in said
    assert ("at the cost of others" in said) == (at_best["elsewhere"] > held_out[0]["elsewhere"])


def test_without_windows_nothing_is_judged(recovered):
    assert recovered(held_out={"num_windows": 0})[1:] == ([], [])


def test_a_stopped_recovery_goes_on_to_the_same_judgements(recovered, model, tiny, tmp_path):
    wanted = recovered(save_every=3)[1:]
    other = load_model(str(tiny), dtype="float32")
    compress(other, PLAN)

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    options = {"folder": tmp_path / "stopped", "seed": 0, "teacher": str(tiny)}
    with pytest.raises(KeyboardInterrupt):
        recover(other, load_tokenizer(str(tiny)), settings(save_every=3), progress=stop, **options)
    again = load_model(str(tiny), dtype="float32")
    compress(again, PLAN)
    rows = recover(again, load_tokenizer(str(tiny)), settings(save_every=3), **options)
    found = ([row for row in rows if row["kind"] == kind] for kind in ("held_out", "kept"))
    assert tuple(found) == wanted
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("answers_only", (False, True))
def test_held_out_windows_of_a_text_are_never_learned_from(tiny, tmp_path, answers_only):
    words = " ".join(f"w{number}" for number in range(9000))
    file = tmp_path / "text.txt"
    file.write_text(words)
    sources = [Source(file=str(file)), Source(exam=True)]
    found = Mixture(
        load_tokenizer(str(tiny)),
        sources,
        window=96,
        num_windows=400,
        seed=3,
        num_held_out=8,
        answers_only=answers_only,
    )
    apart = {tuple(window["input_ids"].tolist()) for window in found.held_out}
    assert len(apart) == 8
    assert not apart & {tuple(found[number]["input_ids"].tolist()) for number in range(len(found))}
    of_text = [w for w in found.windows[0].ids]
    assert len({tuple(ids.tolist()) for ids in of_text} & apart) == 0


def test_a_short_text_gives_at_most_a_tenth_of_its_windows(tiny, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two three four five six seven eight nine ten " * 12)
    tokenizer = load_tokenizer(str(tiny))
    mixture = Mixture(tokenizer, [Source(file=str(file))], window=8, num_windows=4, seed=0, num_held_out=1000)
    assert 0 < len(mixture.held_out) == (len(mixture.held_out) + len(mixture.windows[0].ids)) // 10


def test_judged_steps_are_spread_and_end_with_the_last():
    assert judged_steps(10, 5) == {2, 4, 6, 8, 10}
    assert judged_steps(3, 5) == {1, 2, 3}
    assert max(judged_steps(1, 4)) == 1


@pytest.mark.parametrize("top_k", ("all", 32))
def test_the_dense_model_stays_where_it_is(tiny, tmp_path, top_k):
    """Its logits are the teacher's, so that only rounding is left to learn from; Adam would make whole steps of it."""
    model = load_model(str(tiny), dtype="float32")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    wanted = settings(loss="kl", distill={"top_k": top_k}, learning_rate="auto")
    rows = recover(model, load_tokenizer(str(tiny)), wanted, folder=tmp_path / "c", seed=0, teacher=str(tiny))
    losses = [row["loss"] for row in rows if row["kind"] == "held_out"]
    assert max(losses) < 1e-3
    kept = rows[-1]
    assert kept["loss"] <= losses[0]
    if kept["step"] == 0:
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
