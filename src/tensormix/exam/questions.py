"""Four-choice questions without end, seeded, and cut into three splits that never share a question."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from random import Random
from typing import Literal

from tensormix.exam.families import FAMILIES

LETTERS = "ABCD"
SUBJECTS = tuple(FAMILIES)
Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Question:
    id: str  # 12 hexadecimal digits of the hash of stem and choices
    subject: str
    stem: str
    choices: tuple[str, str, str, str]
    gold: int  # 0..3, the position of the right choice

    @property
    def split(self) -> Split:
        """Decided by the question itself: one in ten is for testing, one in ten for the worked examples."""
        return {0: "test", 1: "dev"}.get(int(self.id, 16) % 10, "train")  # type: ignore[return-value]


def make_question(subject: str, random: Random) -> Question:
    stem, answer, wrong = FAMILIES[subject](random)
    gold = random.randrange(4)
    choices = (*wrong[:gold], answer, *wrong[gold:])
    identity = hashlib.sha256("\n".join((stem, *choices)).encode()).hexdigest()[:12]
    return Question(identity, subject, stem, choices, gold)  # type: ignore[arg-type]


def questions(split: Split, seed: int, subjects: Sequence[str] = SUBJECTS) -> Iterator[Question]:
    """Questions of one split without end, the subjects in turn; the same seed gives the same questions.

    Raises:
        ValueError: an unknown subject.
    """
    for subject in subjects:
        if subject not in FAMILIES:
            near = get_close_matches(subject, SUBJECTS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"exam: unknown subject {subject!r}{hint} Known: {', '.join(SUBJECTS)}.")
    random = Random(f"{split}/{seed}")
    while True:
        for subject in subjects:
            question = make_question(subject, random)
            while question.split != split:
                question = make_question(subject, random)
            yield question


def exam(num_questions: int, seed: int, subjects: Sequence[str] = SUBJECTS, split: Split = "test") -> list[Question]:
    """`num_questions` different questions, the subjects in turn.

    Raises:
        ValueError: fewer than one question, or an unknown subject.
    """
    if num_questions < 1:
        raise ValueError(f"exam: num_questions must be at least 1, got {num_questions}.")
    found: dict[str, Question] = {}
    for question in questions(split, seed, subjects):
        found.setdefault(question.id, question)
        if len(found) == num_questions:
            break
    return list(found.values())


def worked_examples(subject: str, shots: int, seed: int = 0) -> list[Question]:
    """The examples shown before every question of a subject: the first `shots` of the dev split, as MMLU does."""
    return list(islice(questions("dev", seed, [subject]), shots))
