"""What a run measures of a model: the evaluate and diagnose stages of a recipe, without folders and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tensormix.data import calibration_batches, describe, packed_source, separator_of
from tensormix.diagnose import Diagnose, diagnose, run_diagnostics
from tensormix.evaluate import ChoicePrompt, evaluate_choices, perplexity
from tensormix.exam import exam, prompt, worked_examples
from tensormix.plan import Plan, Rule
from tensormix.recipe import Recipe
from tensormix.settings import Calibration, Evaluate, Exam, Source
from tensormix.walk import compress

Row = dict[str, Any]
Progress = Callable[[int, int], None]


def evaluate_rows(model: Any, tokenizer: Any, settings: Evaluate, *, progress: Progress) -> list[Row]:
    """Perplexity of every text, then the exam."""
    rows: list[Row] = []
    for text in settings.perplexity:
        ids = packed_source(tokenizer, text.text)[: text.num_tokens]
        rows.append(
            perplexity(
                model,
                ids,
                window=text.window,
                stride=text.stride,
                text=describe(text.text),
                bos_id=separator_of(tokenizer) if text.bos else None,
                batch_size=settings.batch_size,
            )
        )
    if settings.exam is not None:
        rows += evaluate_choices(
            model, tokenizer, exam_prompts(settings.exam), batch_size=settings.batch_size, progress=progress
        )
    return rows


def diagnose_rows(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    answers: Sequence[Row],
    *,
    reference_rows: Sequence[Row] | None,
    dense: Callable[[], Any],
    progress: Progress,
) -> list[Row]:
    """Entropies and geometry on the exam, then the diagnostics that the recipe names.

    Args:
        answers: the rows of the evaluate stage.
        reference_rows: the diagnose rows of the dense model, None where this is the dense model.
        dense: loads the dense model; called only if a diagnostic compares with it.
    """
    settings, asked = recipe.diagnose or Diagnose(), recipe.evaluate.exam
    rows: list[Row] = []
    if asked is not None:
        prompts = exam_prompts(asked)[: settings.num_prompts]
        rows += diagnose(model, tokenizer, prompts, answers, reference_rows=reference_rows)
    is_dense = not len(recipe.plan.root)
    chosen = settings.chosen(is_dense)
    if chosen:
        rows += run_diagnostics(
            chosen,
            model,
            windows(tokenizer, settings, recipe.seed),
            reference=None if is_dense else dense(),
            compress=lambda other, index: compress_block(other, tokenizer, recipe, index),
            progress=progress,
        )
    return rows


def compress_block(model: Any, tokenizer: Any, recipe: Recipe, index: int) -> None:
    """Compress one block of a dense model by the methods of the plan, whichever blocks they were meant for."""
    rules = tuple(Rule(**{**dict(rule), "blocks": str(index)}) for rule in recipe.plan.root)
    settings = recipe.calibration
    compress(model, Plan(rules), None if settings is None else windows(tokenizer, settings, recipe.seed))


def windows(tokenizer: Any, settings: Calibration | Diagnose, seed: int) -> list[torch.Tensor]:  # (1, T) each
    """The windows of tokens that a section of a recipe asks for."""
    text: Source = settings.text
    return calibration_batches(tokenizer, text, num_windows=settings.num_windows, window=settings.window, seed=seed)


def exam_prompts(settings: Exam) -> list[ChoicePrompt]:
    """The questions of the built-in exam as prompts, the subjects in turn."""
    examples: dict[str, list] = {}
    prompts = []
    for question in exam(settings.num_questions, settings.seed):
        shown = examples.setdefault(question.subject, worked_examples(question.subject, settings.shots))
        prompts.append(
            ChoicePrompt(id=question.id, subject=question.subject, text=prompt(question, shown), gold=question.gold)
        )
    return prompts
