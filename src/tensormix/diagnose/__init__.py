"""The diagnose stage: what changes inside a model and in its answers as blocks are compressed, as rows.

`entropy`, `geometry` look at one checkpoint; `crossing` and `boundary` at the rows of a whole sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tensormix.diagnose.bisect import bisect_boundary
from tensormix.diagnose.boundary import Boundary, Measurement, find_boundary
from tensormix.diagnose.crossing import Crossing, fit_crossing
from tensormix.diagnose.entropy import entropy_rows, output_entropy, prediction_entropy
from tensormix.diagnose.geometry import drift_map, geometry_rows, similarity_map
from tensormix.evaluate.choices import ChoicePrompt
from tensormix.evaluate.forward import Progress

DIAGNOSTICS: dict[str, Callable[..., Any]] = {
    "output_entropy": output_entropy,
    "prediction_entropy": prediction_entropy,
    "similarity": similarity_map,
    "drift": drift_map,
    "drift_crossing": fit_crossing,
    "boundary": find_boundary,
}


def diagnose(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ChoicePrompt],
    answer_rows: Sequence[dict[str, Any]],
    *,
    reference_rows: Sequence[dict[str, Any]] | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Entropies of the answers (evaluate rows; rows of other kinds are passed over), then the geometry on the prompts.

    With `reference_rows`, the dense model's own diagnose rows on the same prompts, the drift is there too.
    Raises ValueError for an empty set, prompts longer than the context, and states or logits that are not finite.
    """
    answers = [row for row in answer_rows if row["kind"] == "answer"]
    return entropy_rows(answers) + geometry_rows(
        model, tokenizer, prompts, reference_rows=reference_rows, batch_size=batch_size, progress=progress
    )


__all__ = [
    "DIAGNOSTICS",
    "Boundary",
    "Crossing",
    "Measurement",
    "bisect_boundary",
    "diagnose",
    "drift_map",
    "entropy_rows",
    "find_boundary",
    "fit_crossing",
    "geometry_rows",
    "output_entropy",
    "prediction_entropy",
    "similarity_map",
]
