"""The evaluate stage: perplexity of texts, KL from the dense model, accuracy on four-choice questions and on published
benchmarks, as rows."""

from __future__ import annotations

from tensormix.evaluate.benchmarks import LETTERED, check_installed, choice_prompts
from tensormix.evaluate.choices import ChoicePrompt, accuracy_rows, evaluate_choices
from tensormix.evaluate.divergence import kl_divergence
from tensormix.evaluate.harness import ask, macro_drop_row, macro_row
from tensormix.evaluate.perplexity import perplexity
from tensormix.evaluate.questions_file import answer_prompts, exam_prompts, has_answers, read_prompts

__all__ = [
    "LETTERED",
    "ChoicePrompt",
    "accuracy_rows",
    "answer_prompts",
    "ask",
    "check_installed",
    "choice_prompts",
    "evaluate_choices",
    "exam_prompts",
    "has_answers",
    "kl_divergence",
    "macro_drop_row",
    "macro_row",
    "perplexity",
    "read_prompts",
]
