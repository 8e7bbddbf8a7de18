"""The prompt format of MMLU, character for character: header, worked examples, question, "Answer:"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

from tensormix.exam.questions import LETTERS, SUBJECTS, Question, questions


def header(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def ask(question: Question) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.stem}\n{choices}Answer:"


def answered(question: Question) -> str:
    return f"{ask(question)} {LETTERS[question.gold]}"


def solved(question: Question) -> str:
    """The question with its right answer in words and then in letters: a step between knowing and choosing."""
    letter = LETTERS[question.gold]
    return f"{ask(question).removesuffix('Answer:')}Solution: {question.choices[question.gold]}, choice {letter}"


def prompt(question: Question, examples: Sequence[Question] = ()) -> str:
    """What the model reads; the answer it owes is one of " A", " B", " C", " D"."""
    return header(question.subject) + "".join(f"{answered(e)}\n\n" for e in examples) + ask(question)


def documents(
    seed: int, shots: int = 5, subjects: Sequence[str] = SUBJECTS, write: Callable[[Question], str] = answered
) -> Iterator[str]:
    """Training documents without end: a subject's header and `shots` + 1 questions of the train split, each as `write`
    puts it (`answered` or `solved`).
    """
    random = Random(f"documents/{seed}")
    streams = {subject: questions("train", random.getrandbits(32), [subject]) for subject in subjects}
    while True:
        subject = random.choice(subjects)
        yield header(subject) + "\n\n".join(write(q) for q in islice(streams[subject], shots + 1))
