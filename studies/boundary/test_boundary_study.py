"""The study of the boundary: its questions are held out and right, its errors are what the rows say, its page too."""

import json
from itertools import islice
from pathlib import Path

import page as page_maker
import pytest
import study
import tasks as task_maker
import torch
import train as training
import yaml

STUDY = Path(__file__).parent


TASKS = ("extreme", "sums", "majority", "knowledge", "holder")


@pytest.mark.parametrize("task", TASKS)
def test_a_text_has_one_length_and_no_test_question_but_of_what_is_known_by_heart(task):
    texts = list(islice(task_maker.documents([task], 5), 300))
    assert len({len(text.split()) for text in texts}) == 1
    asked = list(islice(task_maker.questions([task], 5), 300))
    assert {gold for _, _, gold in asked} == {0, 1, 2, 3}
    if task not in task_maker.BY_HEART:
        held_out = {text.lstrip(". ") for _, text, _ in asked}
        learned = {first_question(text) for text in texts}
        assert not held_out & learned


def first_question(text):
    return text.lstrip(". ").partition("Answer:")[0] + "Answer:"


def test_the_right_answers_are_right():

    number = {word: place for place, word in enumerate(task_maker.VALUES)}
    for _, text, gold in islice(task_maker.questions(["extreme"], 1), 50):
        given, word = text.removesuffix(" Answer:").split(" ? ")
        values = [number[w] for w in given.split()[1::2]]
        assert given.split()[::2] == list(task_maker.LETTERS)
        assert values[gold] == (max if word == "largest" else min)(values)
    for _, text, gold in islice(task_maker.questions(["sums"], 1), 50):
        assert sum(number[w] for w in text.split() if w in number) % 4 == gold
    for _, text, gold in islice(task_maker.questions(["majority"], 1), 50):
        words = text.split()
        assert all(
            words.count(task_maker.LETTERS[gold]) > words.count(x)
            for x in task_maker.LETTERS
            if x != task_maker.LETTERS[gold]
        )


def test_what_is_known_by_heart_is_the_same_in_every_text():
    answers = {}
    for text in [
        *islice(task_maker.documents(["holder"], 1), 200),
        *islice(task_maker.documents(["knowledge"], 2), 200),
    ]:
        for asked in text.split("? ")[1:]:
            words, letter = asked.split(" Answer: ")
            if words.startswith("n"):
                answers.setdefault(words, set()).add(letter.strip())
    assert len(answers) > 100 and all(len(letters) == 1 for letters in answers.values())


def test_mixed_tasks_have_one_length():
    texts = list(islice(task_maker.documents(["extreme", "majority"], 0), 50))
    assert len({len(text.split()) for text in texts}) == 1
    assert {"?" in text and text.startswith(".") for text in texts} == {True, False}


def test_the_batched_muon_takes_torchs_steps():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 8), (16, 8), (8, 16), (8, 8))]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in start] for _ in range(2))
    muon = training.BatchedMuon(ours)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        muon.step(0.1)
        reference.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() < 0.03 * moved  # torch turns them in bfloat16


def trained(**changes):
    """Some steps of a tiny model; the update of each block's `o_proj` relative to itself, and what was noted."""
    settings = {"tasks": ["sums"], "blocks": 3, "width": 16, "seed": 0, "batch": 2, "steps": 10, "skip": 0.0} | changes
    model, tokenizer, took = training.train(settings)
    torch.manual_seed(0)
    before = type(model)(training.config_of(settings, len(tokenizer)))
    pairs = zip(model.model.layers, before.model.layers, strict=True)
    return [float((a.self_attn.o_proj.weight - b.self_attn.o_proj.weight).detach().norm()) for a, b in pairs], took


def test_a_grown_model_begins_with_its_blocks_alone_and_the_others_join_once_these_know_enough(monkeypatch):
    (first, middle, last), took = trained(grown_from=[1])
    assert max(first, last) < 0.05 * middle and took["joined_at"] is None  # of the others only the decay
    assert min(trained()[0]) > 0.5 * middle
    monkeypatch.setattr(training, "ENOUGH", -1.0)
    (first, middle, last), took = trained(grown_from=[1])
    assert min(first, last) > 0.2 * middle and took["joined_at"] == 1


def test_later_blocks_are_skipped_more_often():
    settings = {"blocks": 5, "skip": 0.4}
    assert training.skip_rates(settings) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert training.skip_rates(settings | {"grown_from": [1, 2]}) == [1, 0, 0, 1, 1]


def rows_of(model, direction, measured, said, accuracies, blocks=4, signals=None):
    cells = [{"depth": d, "accuracy": a, "num_questions": 400, "steps": 30 * (d > 0)} for d, a in enumerate(accuracies)]
    labels = {"model": model, "direction": direction, "blocks": blocks}
    names = ("all", "drift", "output_entropy", "divergence", "local_error", "effective_rank")
    signals = signals or {name: list(range(blocks + 1)) for name in names[1:]}
    boundary = {"value": measured, "low": measured, "high": measured}
    prediction = {"said": dict(zip(names, said, strict=True)), "low": min(said), "high": max(said), "signals": signals}
    early = [cell | {"steps": min(cell["steps"], 15)} for cell in cells[::2]]
    return [
        labels | {"kind": "prediction", "seconds": 20.0} | prediction,
        labels | {"kind": "scan", "cells": cells, "boundary": boundary, "seconds": 200.0},
        labels | {"kind": "bisect", "cells": cells[::2], "boundary": boundary},
        labels | {"kind": "early_stop", "cells": early, "boundary": boundary},
    ]


FALL = [0.95, 0.95, 0.94, 0.3, 0.25]


def test_errors_are_of_held_out_models_alone_and_in_blocks():
    rows = rows_of("a", "last", 3, [3, 2, 3, 4, 1, 3], FALL)
    rows += rows_of("b", "last", 1, [3, 2, 3, 4, 1, 3], [0.95, 0.3, 0.3, 0.3, 0.3])
    rows += rows_of("embedded", "last", 3, [1, 1, 1, 1, 1, 1], FALL)
    rows += rows_of("unbroken", "last", None, [1, 1, 1, 1, 1, 1], [0.9] * 5)
    errors = page_maker.errors(page_maker.cases(rows))
    assert errors["**combined rule**"] == {("a", "last"): 0, ("b", "last"): 2}
    assert errors["drift"] == {("a", "last"): 1, ("b", "last"): 1}
    assert errors["always the middle depth"] == {("a", "last"): 1, ("b", "last"): 1}
    assert errors["always 7/12 of the blocks"] == {("a", "last"): 1, ("b", "last"): 1}  # 4 * 7 / 12 = 2.3
    (line,) = [line for line in page_maker.errors_table(page_maker.cases(rows)) if line[0] == "**combined rule**"]
    assert line[1:3] == ["1.00", "1 of 2"]
    assert page_maker.distance(None, 3, 4) == 2


def test_savings_count_recovered_checkpoints_and_their_steps():
    lines = page_maker.savings(page_maker.cases(rows_of("a", "last", 3, [3] * 6, FALL)))
    assert lines[1] == ["a", "last", "4, 120", "2, 60", "0.50", "2, 30", "0.25", "0.10", "3", "3", "3"]
    assert (lines[-1][4], lines[-1][6], lines[-1][7]) == ("0.50", "0.25", "0.10")


def test_bisection_asks_for_about_log2_of_the_depths():
    by_blocks = {line[0]: line for line in page_maker.larger({})[1:]}
    assert float(by_blocks["12"][1]) <= 12 / 2 and int(by_blocks["80"][2]) <= 10


def test_a_table_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no table 'nothing'; there are predictions, errors"):
        page_maker.fill("<!-- nothing -->\n<!-- end -->\n", [])


def test_every_model_can_be_made_and_every_row_is_of_one():
    models = yaml.safe_load((STUDY / "models.yaml").read_text())
    for about in models.values():
        assert set(about["tasks"]) <= set(TASKS)
    rows = [json.loads(line) for line in (STUDY / "results.jsonl").read_text().splitlines()]
    keys = [study.label(row) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row["model"] for row in rows} <= {*models, "embedded"}
    trained = [json.loads(line) for line in (STUDY / "training.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} - {"embedded"} <= {row["model"] for row in trained}
    for row in [*rows, *trained]:
        assert row["environment"]["versions"]["torch"] and row["environment"]["commit"] and row["finished"]


def test_nothing_was_predicted_after_its_boundary_was_measured():
    seen = set()
    for line in (STUDY / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "scan" and row["model"] != "embedded":
            assert (row["model"], row["direction"]) in seen
        seen |= {(row["model"], row["direction"])} if row["kind"] == "prediction" else set()


def test_the_page_in_the_docs_is_the_one_of_the_rows():
    page = (STUDY.parents[1] / "docs" / "boundary.md").read_text()
    assert page_maker.fill(page, page_maker.read(STUDY / "results.jsonl")) == page
