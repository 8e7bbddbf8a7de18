"""The diagnose stage: what changes inside a model and in its answers as blocks are compressed, as rows.

`entropy` and `geometry` look at one checkpoint on the exam, the diagnostics of `table` at models and batches of tokens;
`crossing`, `boundary` and `scaling` at the rows of a whole sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tensormix.diagnose.base import Batches, Compress, Diagnostic, Row
from tensormix.diagnose.bisect import bisect_boundary
from tensormix.diagnose.boundary import Boundary, Measurement, find_boundary
from tensormix.diagnose.crossing import Crossing, fit_crossing
from tensormix.diagnose.entropy import answers_by_task, entropy_rows, output_entropy, prediction_entropy
from tensormix.diagnose.geometry import drift_map, geometry_rows, similarity_map
from tensormix.diagnose.scaling import fit_trend, scaling_rows
from tensormix.diagnose.table import SELECTABLE, Diagnose
from tensormix.evaluate.choices import ChoicePrompt
from tensormix.rows import Progress

ALWAYS: dict[str, Callable[..., Any]] = {  # in every run with an exam, and in every sweep
    "output_entropy": output_entropy,
    "prediction_entropy": prediction_entropy,
    "similarity": similarity_map,
    "drift": drift_map,
    "drift_crossing": fit_crossing,
    "boundary": find_boundary,
    "scaling": scaling_rows,
}
DIAGNOSTICS: dict[str, Callable[..., Any]] = {**ALWAYS, **SELECTABLE}


def diagnose(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ChoicePrompt],
    answer_rows: Sequence[dict[str, Any]],
    *,
    reference_rows: Sequence[dict[str, Any]] | None = None,
    entropies_of: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Entropies of the answers (evaluate rows), task by task, then the geometry on the prompts.

    `entropies_of` names the tasks; without it every one whose answers are four letters.
    With `reference_rows`, the dense model's own diagnose rows on the same prompts, the drift is there too.
    Raises ValueError for an empty set, prompts longer than the context, and states or logits that are not finite.
    """
    rows = []
    for task, answers in answers_by_task(answer_rows, entropies_of).items():
        rows += [{**row, "task": task} for row in entropy_rows(answers)]
    return rows + geometry_rows(
        model, tokenizer, prompts, reference_rows=reference_rows, batch_size=batch_size, progress=progress
    )


def run_diagnostics(
    chosen: Sequence[Diagnostic],
    model: nn.Module,
    batches: Batches,
    *,
    reference: nn.Module | None = None,
    compress: Compress | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of each chosen diagnostic, in order. Raises ValueError for what a diagnostic finds wrong."""
    rows = []
    for done, diagnostic in enumerate(chosen, 1):
        rows += diagnostic(model, batches, reference=reference, compress=compress)
        if progress is not None:
            progress(done, len(chosen))
    return rows


__all__ = [
    "ALWAYS",
    "DIAGNOSTICS",
    "SELECTABLE",
    "Boundary",
    "Crossing",
    "Diagnose",
    "Diagnostic",
    "Measurement",
    "bisect_boundary",
    "diagnose",
    "drift_map",
    "entropy_rows",
    "find_boundary",
    "fit_crossing",
    "fit_trend",
    "geometry_rows",
    "output_entropy",
    "prediction_entropy",
    "run_diagnostics",
    "scaling_rows",
    "similarity_map",
]
