"""The evaluate stage: perplexity of texts and accuracy on four-choice questions, as rows."""

from __future__ import annotations

from tensormix.evaluate.choices import ChoicePrompt, accuracy_rows, evaluate_choices
from tensormix.evaluate.perplexity import perplexity

__all__ = ["ChoicePrompt", "accuracy_rows", "evaluate_choices", "perplexity"]
