"""The exam's answers are right, its splits never meet, its prompts are MMLU's."""

import json
import re
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest

from tensormix.exam import (
    SUBJECTS,
    answered,
    documents,
    exam,
    facts,
    header,
    prompt,
    questions,
    solved,
    worked_examples,
)
from tensormix.exam.families import FAMILIES
from tensormix.exam.words import CATEGORIES, DAYS, LETTERS, MONTHS, OPPOSITES

MMLU = Path(__file__).parents[2] / ".." / "shared" / "data" / "bench" / "mmlu_dev.jsonl"


def right_answer(subject: str, stem: str, choices: tuple[str, ...]) -> str:
    """The answer worked out anew from the words of the question."""
    numbers = [int(n) for n in re.findall(r"\d+", stem)]
    if subject == "addition":
        return str(numbers[0] + numbers[1])
    if subject == "subtraction":
        return str(numbers[0] - numbers[1])
    if subject == "number order":
        return str((max if "largest" in stem else min)(map(int, choices)))
    if subject == "number sequences":
        steps = {after - before for before, after in pairwise(numbers)}
        assert len(steps) == 1
        return str(numbers[-1] + steps.pop())
    if subject == "fixed orders":
        word = stem.split()[-1].rstrip("?")
        cycle = next(cycle for cycle in (DAYS, MONTHS, LETTERS) if word in cycle)
        return cycle[(cycle.index(word) + (1 if "after" in stem else -1)) % len(cycle)]
    if subject == "lists":
        who = stem.split()[-1].rstrip("?")
        return dict(re.findall(r"(\w+) has (\d+)", stem))[who]
    if subject == "opposites":
        pairs = dict(OPPOSITES) | {right: left for left, right in OPPOSITES}
        return pairs[stem.split()[-1].rstrip("?")]
    (kind,) = [kind for kind in CATEGORIES if stem.endswith(f" {kind}?")]
    (member,) = [choice for choice in choices if choice in CATEGORIES[kind]]
    return member


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_marked_choice_is_the_only_right_one(subject):
    for question in islice(questions("train", 3, [subject]), 400):
        assert len(set(question.choices)) == 4
        assert question.choices[question.gold] == right_answer(subject, question.stem, question.choices)


def test_the_place_of_the_right_choice_tells_nothing():
    counts = [0] * 4
    for question in exam(2000, seed=5):
        counts[question.gold] += 1
    assert all(400 < count < 600 for count in counts)  # 500 +- 5 standard deviations


def test_the_size_of_a_number_tells_little():
    """Always taking the smallest, the second smallest, ... of the four must not beat chance by much."""
    for subject in ("addition", "subtraction", "number sequences"):
        for place in range(4):
            asked = list(islice(questions("train", 9, [subject]), 600))
            hits = sum(sorted(q.choices, key=int)[place] == q.choices[q.gold] for q in asked)
            assert hits / len(asked) < 0.33  # chance and 4 standard deviations


def test_splits_never_share_a_question():
    seen = {split: {q.id for q in islice(questions(split, 0), 3000)} for split in ("train", "dev", "test")}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["dev"]
    assert not seen["dev"] & seen["test"]


def test_training_documents_hold_no_test_question():
    held_out = {q.stem + "\n" + "\n".join(q.choices) for q in exam(2000, seed=1)}
    for text in islice(documents(0), 500):
        for block in text.split("\n\n")[1:]:
            stem, *choices, _ = block.split("\n")
            assert "\n".join([stem, *(choice[3:] for choice in choices)]) not in held_out


def test_the_same_seed_gives_the_same_exam_and_another_seed_another():
    assert exam(50, seed=1) == exam(50, seed=1)
    assert exam(50, seed=1) != exam(50, seed=2)
    assert exam(100, seed=1)[:50] == exam(50, seed=1)
    assert len({q.id for q in exam(800, seed=1)}) == 800


def test_the_prompt_is_the_one_of_mmlu():
    """Header, worked example, question, as lm-eval writes them for cais/mmlu."""
    question, example = exam(1, seed=1)[0], worked_examples("addition", 1)[0]
    a, b, c, d = question.choices
    e = example.choices
    assert prompt(question, [example]) == (
        "The following are multiple choice questions (with answers) about addition.\n\n"
        f"{example.stem}\nA. {e[0]}\nB. {e[1]}\nC. {e[2]}\nD. {e[3]}\nAnswer: {'ABCD'[example.gold]}\n\n"
        f"{question.stem}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    )


def test_worked_examples_come_from_the_dev_split_and_never_change():
    for subject in SUBJECTS:
        shown = worked_examples(subject, 5)
        assert [q.split for q in shown] == ["dev"] * 5
        assert shown == worked_examples(subject, 5)
        assert shown[:3] == worked_examples(subject, 3)


def test_documents_hold_six_answered_questions_of_one_subject():
    for text in islice(documents(2), 50):
        assert text.startswith("The following are multiple choice questions (with answers) about ")
        assert len(re.findall(r"Answer: [A-D](?=\n|$)", text)) == 6


def test_a_solved_question_names_the_answer_in_words_and_letters():
    question = exam(1, seed=4)[0]
    assert solved(question).endswith(f"Solution: {question.choices[question.gold]}, choice {'ABCD'[question.gold]}")
    assert answered(question).endswith(f"Answer: {'ABCD'[question.gold]}")
    assert header("lists") == "The following are multiple choice questions (with answers) about lists.\n\n"


def test_facts_are_true():
    for paragraph in islice(facts(0), 50):
        for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", paragraph):
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result)
        for large, small in re.findall(r"(\d+) is larger than (\d+)", paragraph):
            assert int(large) > int(small)
        for left, right in re.findall(r"The opposite of (\w+) is (\w+)", paragraph):
            assert (left, right) in OPPOSITES or (right, left) in OPPOSITES


def test_families_never_offer_a_negative_number():
    random = Random(0)
    for subject in ("addition", "subtraction", "number sequences"):
        for _ in range(500):
            stem, answer, wrong = FAMILIES[subject](random)
            assert min(map(int, [answer, *wrong])) >= 0, stem


def test_an_unknown_subject_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown subject 'additon', did you mean 'addition'\? Known: addition, "):
        next(questions("train", 0, ["additon"]))


def test_an_empty_exam_is_refused():
    with pytest.raises(ValueError, match=r"num_questions must be at least 1, got 0"):
        exam(0, seed=1)


@pytest.mark.skipif(not MMLU.exists(), reason="shared/data is not here: no MMLU file to compare the format with")
def test_a_real_mmlu_question_fits_the_format():
    """The fields of MMLU's own file make the same kind of prompt: four choices, one gold letter."""
    from tensormix.exam import Question

    row = json.loads(MMLU.read_text(encoding="utf-8").splitlines()[0])
    question = Question(
        "0" * 12, row["subject"].replace("_", " "), row["query"].strip(), tuple(row["choices"]), row["gold"]
    )
    assert prompt(question).count("\n") == 7 + question.stem.count("\n")
