"""The built-in exam: generated four-choice questions with known answers, in the prompt format of 5-shot MMLU."""

from tensormix.exam.drills import drills
from tensormix.exam.facts import facts
from tensormix.exam.prompts import answered, ask, documents, header, prompt, solved
from tensormix.exam.questions import LETTERS, SUBJECTS, Question, exam, questions, worked_examples

__all__ = [
    "LETTERS",
    "SUBJECTS",
    "Question",
    "answered",
    "ask",
    "documents",
    "drills",
    "exam",
    "facts",
    "header",
    "prompt",
    "questions",
    "solved",
    "worked_examples",
]
