"""What a run measures of a model: the evaluate and diagnose stages of a recipe, without folders and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensormix.compression import compress
from tensormix.data import describe, packed_source, separator_of, windows_of
from tensormix.diagnose import Diagnose, diagnose, run_diagnostics
from tensormix.evaluate import (
    answer_prompts,
    ask,
    evaluate_choices,
    exam_prompts,
    kl_divergence,
    macro_drop_row,
    macro_row,
    perplexity,
)
from tensormix.plan import Plan, Rule
from tensormix.recipe import Recipe
from tensormix.rows import Progress, Row
from tensormix.settings import Evaluate
from tensormix.sites import find_sites


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
        rows.append(perplexity(model, **asked) | ({"domain": text.domain} if text.domain else {}))
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
            windows_of(tokenizer, settings, recipe.seed),
            reference=None if is_dense else dense(),
            compress=lambda other, index: compress_block(other, tokenizer, recipe, index),
            progress=progress,
        )
    return rows


def compress_block(model: Any, tokenizer: Any, recipe: Recipe, index: int) -> None:
    """Compress one block of a dense model by the methods of the plan, whichever blocks they were meant for."""
    moved = [Rule(**{**dict(rule), "blocks": str(index)}) for rule in recipe.plan.root]
    here = [site for site in find_sites(model) if site.block == index]
    # A budget names every site in a rule of its own: those of other blocks match nothing here.
    rules = tuple(rule for rule in dict.fromkeys(moved) if any(rule.matches(site) for site in here))
    settings = recipe.calibration
    compress(model, Plan(rules), None if settings is None else windows_of(tokenizer, settings, recipe.seed))
