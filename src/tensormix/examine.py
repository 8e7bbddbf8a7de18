"""What a run measures of a model: the evaluate and diagnose stages of a recipe, without folders and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tensormix.compression import compress
from tensormix.data import calibration_batches, describe, packed_source, separator_of
from tensormix.diagnose import Diagnose, diagnose, run_diagnostics
from tensormix.evaluate import (
    LETTERED,
    ChoicePrompt,
    ask,
    choice_prompts,
    evaluate_choices,
    kl_divergence,
    macro_drop_row,
    macro_row,
    perplexity,
    read_prompts,
)
from tensormix.exam import exam, prompt, worked_examples
from tensormix.plan import Plan, Rule
from tensormix.recipe import Recipe
from tensormix.rows import Progress, Row
from tensormix.settings import Calibration, Evaluate, Exam, Source


def evaluate_rows(
    model: Any,
    tokenizer: Any,
    settings: Evaluate,
    *,
    dense: Callable[[], Any] | None = None,
    journals: Path | None = None,
    progress: Progress,
) -> list[Row]:
    """Perplexity of every text, then the exam, then the benchmarks, whose answers are kept in `journals` meanwhile.

    `dense` loads the dense model, from which the divergence on the texts is measured; None where `model` is that.
    """
    rows: list[Row] = []
    for text in settings.perplexity:
        ids = packed_source(tokenizer, text.text)[: text.num_tokens]
        bos = separator_of(tokenizer) if text.bos else None
        asked: dict[str, Any] = {"token_ids": ids, "window": text.window, "stride": text.stride, "bos_id": bos}
        asked["text"] = describe(text.text)
        asked["batch_size"] = settings.batch_size
        rows.append(perplexity(model, **asked))
        if settings.kl and dense is not None:
            rows.append(kl_divergence(model, dense(), **asked))
    if settings.exam is not None:
        prompts = exam_prompts(settings.exam)
        rows += evaluate_choices(model, tokenizer, prompts, batch_size=settings.batch_size, progress=progress)
    for benchmark in settings.benchmarks:
        journal = journals / f"{benchmark.name}.jsonl" if journals else None
        rows += ask(model, tokenizer, benchmark, batch_size=settings.batch_size, journal=journal, progress=progress)
    return rows + macro_row(rows)


def diagnose_rows(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    answers: Sequence[Row],
    *,
    reference_rows: Sequence[Row] | None,
    reference_answers: Sequence[Row] | None,
    dense: Callable[[], Any],
    progress: Progress,
) -> list[Row]:
    """Entropies and geometry at the answers, the macro drop, then the diagnostics that the recipe names.

    Args:
        answers: the rows of the evaluate stage.
        reference_rows: the diagnose rows of the dense model, None where this is the dense model.
        reference_answers: its evaluate rows.
        dense: loads the dense model; called only if a diagnostic compares with it.
    """
    settings = recipe.diagnose or Diagnose()
    rows: list[Row] = []
    if prompts := answer_prompts(recipe.evaluate, answers)[: settings.num_prompts]:
        rows += diagnose(
            model, tokenizer, prompts, answers, reference_rows=reference_rows, entropies_of=settings.entropies_of
        )
    rows += macro_drop_row(answers, reference_answers or ())
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
