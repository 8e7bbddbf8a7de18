"""Output entropy and prediction entropy, from answer rows only (arXiv 2605.25344, Eq. 3 and 4).

An answer row holds `logits` (the four answer tokens' logits) and `predicted` (0..3). Both entropies are divided by
log 4, so that 1 is a uniform choice and 0 a certain one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

NUM_CHOICES = 4


def answers_by_task(rows: Sequence[dict[str, Any]], tasks: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """The answer rows with four logits of each task; of `tasks` alone, if given.

    Raises ValueError for a task of `tasks` that was not asked or whose answers are not four letters.
    """
    found: dict[str, list[Any]] = {}
    for row in rows:
        if row["kind"] == "answer":
            found.setdefault(row.get("task", "exam"), []).append(row)
    lettered = {task: answers for task, answers in found.items() if "logits" in answers[0]}
    for task in tasks or ():
        if task not in lettered:
            reason = next((row["reason"] for row in rows if row["kind"] == "no_entropy" and row["task"] == task), "")
            why = reason or ("its answers are no letters" if task in found else "it was not asked")
            raise ValueError(
                f"OE and PE of {task}: they need the logits of four answer letters for every question, and there are "
                f"none: {why}; those of {', '.join(lettered) or 'no task'} can be taken"
            )
    return lettered if tasks is None else {task: lettered[task] for task in tasks}


def output_entropy(answers: Sequence[dict[str, Any]]) -> float:
    """OE = mean over questions of H4(p) / log 4, p the softmax over the four answer logits (Eq. 3).

    Raises ValueError for no answers and for a logit that is not a finite number.
    """
    _check(answers)
    return math.fsum(_entropy(_softmax(row["logits"], row["id"])) for row in answers) / len(answers) / _unit()


def prediction_entropy(answers: Sequence[dict[str, Any]]) -> float:
    """PE = H(f) / log 4, f_j the frequency of predicted label j over the whole set (Eq. 4).

    Raises ValueError for no answers.
    """
    _check(answers)
    counts = Counter(row["predicted"] for row in answers)
    return _entropy([count / len(answers) for count in counts.values()]) / _unit()


def entropy_rows(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both entropies as rows."""
    return [
        {"kind": "output_entropy", "value": output_entropy(answers)},
        {"kind": "prediction_entropy", "value": prediction_entropy(answers)},
    ]


def spread(prediction_entropy: float) -> float:
    """-log10(1 - PE), which separates values near PE = 1; infinite at PE = 1."""
    return -math.log10(1 - prediction_entropy) if prediction_entropy < 1 else math.inf


def _softmax(logits: Sequence[float], question: str) -> list[float]:
    if len(logits) != NUM_CHOICES or not all(math.isfinite(value) for value in logits):
        raise ValueError(f"output entropy: question {question!r} needs four finite logits, got {list(logits)}")
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    return [weight / sum(weights) for weight in weights]


def _entropy(fractions: Sequence[float]) -> float:
    """Entropy in nats; a fraction of zero adds nothing. The 0.0 turns the -0.0 of a certain choice into 0.0."""
    return 0.0 - math.fsum(value * math.log(value) for value in fractions if value > 0)


def _unit() -> float:
    return math.log(NUM_CHOICES)


def _check(answers: Sequence[dict[str, Any]]) -> None:
    if not answers:
        raise ValueError("entropy: there are no answers; the evaluate stage must ask at least one question first")
