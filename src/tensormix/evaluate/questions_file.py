"""The four-choice questions that a recipe asks for: of the built-in exam, or of one's own from a file.

A local file is jsonl, one question a line: `text`, the whole prompt, which ends in "Answer:"; `gold`, the right one of
A, B, C, D as 0 to 3; and, where there are several, `subject`. The texts are asked as they stand, worked examples and
all, so the format is the user's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensormix.data.files import read_text
from tensormix.evaluate.benchmarks import LETTERED, choice_prompts
from tensormix.evaluate.choices import LETTERS, ChoicePrompt
from tensormix.exam import exam, prompt, worked_examples
from tensormix.rows import Row
from tensormix.settings import Evaluate, Exam


def exam_prompts(settings: Exam) -> list[ChoicePrompt]:
    """The questions of the exam as prompts: of a file as they stand, the built-in ones with the subjects in turn.

    Raises ValueError for what `read_prompts` refuses.
    """
    if settings.file is not None:
        return read_prompts(settings.file, settings.num_questions)
    examples: dict[str, list] = {}
    prompts = []
    for question in exam(settings.num_questions, settings.seed):
        shown = examples.setdefault(question.subject, worked_examples(question.subject, settings.shots))
        prompts.append(
            ChoicePrompt(id=question.id, subject=question.subject, text=prompt(question, shown), gold=question.gold)
        )
    return prompts


def has_answers(settings: Evaluate) -> bool:
    """Whether four-letter answers are asked for, at which entropies and geometry can be taken."""
    return settings.exam is not None or any(benchmark.name in LETTERED for benchmark in settings.benchmarks)


def answer_prompts(settings: Evaluate, answers: Sequence[Row]) -> list[ChoicePrompt]:
    """The prompts of the exam, without one those questions of MMLU that were answered; none without either."""
    if settings.exam is not None:
        return exam_prompts(settings.exam)
    answered = {(row["task"], row["subject"], row["id"]) for row in answers if row["kind"] == "answer"}
    lettered = (benchmark for benchmark in settings.benchmarks if benchmark.name in LETTERED)
    return [
        asked
        for benchmark in lettered
        for asked in choice_prompts(benchmark)
        if (benchmark.name, asked.subject, asked.id) in answered
    ]


def read_prompts(path: str, num_questions: int | None = None) -> list[ChoicePrompt]:
    """The first `num_questions` of a file (None: all), in its order; a question without `subject` belongs to "own".

    Raises ValueError for a missing file, a line that is no such question (both name the file), and fewer questions
    than were asked for.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"exam: there is no file {path}; give a .jsonl with text and gold on each line")
    prompts: list[ChoicePrompt] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip() and (num_questions is None or len(prompts) < num_questions):
            prompts.append(_prompt(line, f"{path}, line {number}", str(number)))
    if num_questions is not None and len(prompts) < num_questions:
        raise ValueError(
            f"exam: {num_questions} questions were asked for, {path} has {len(prompts)}; the largest possible "
            f"num_questions is {len(prompts)}"
        )
    return prompts


def _prompt(line: str, where: str, number: str) -> ChoicePrompt:
    try:
        asked: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"exam: {where} is not valid JSON: {error}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("text"), str):
        raise ValueError(f"exam: {where} needs 'text', the prompt up to \"Answer:\"")
    if not asked["text"].endswith("Answer:"):
        raise ValueError(f'exam: {where}: the text must end in "Answer:", it ends in {asked["text"][-12:]!r}')
    gold = asked.get("gold")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(LETTERS):
        raise ValueError(f"exam: {where}: gold must be 0 to 3, the place of the right one of A to D, got {gold!r}")
    return ChoicePrompt(id=number, subject=str(asked.get("subject", "own")), text=asked["text"], gold=gold)
