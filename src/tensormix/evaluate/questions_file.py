"""Four-choice questions of one's own, from a file: what the exam asks where a recipe names one.

A local file is jsonl, one question a line: `text`, the whole prompt, which ends in "Answer:"; `gold`, the right one of
A, B, C, D as 0 to 3; and, where there are several, `subject`. The texts are asked as they stand, worked examples and
all, so the format is the user's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensormix.evaluate.choices import LETTERS, ChoicePrompt


def read_prompts(path: str, num_questions: int | None = None) -> list[ChoicePrompt]:
    """The first `num_questions` of a file (None: all), in its order; a question without `subject` belongs to "own".

    Raises ValueError for a missing file, a line that is no such question (both name the file), and fewer questions
    than were asked for.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"exam: there is no file {path}; give a .jsonl with text and gold on each line")
    prompts: list[ChoicePrompt] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
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
