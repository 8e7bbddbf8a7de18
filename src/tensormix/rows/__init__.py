"""What stages write: the kinds of rows with their keys, the stages in their order, and how progress is told.

A row is a flat JSON object, one measurement or one fact. `ROWS` says which rows each stage writes; of those of one
stage `kind` tells which is which. tests/test_rows.py holds what real stages write against this, so that a key that is
renamed in one place only is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensormix.rows import making, measuring

# Any: which of the kinds below it is, is known when its `kind` has been read.
Row = dict[str, Any]
Progress = Callable[[int, int], None]  # items done, items in all
StageProgress = Callable[[str, int, int], None]  # stage, steps done, steps in all
SweepProgress = Callable[[str, float, float], None]  # cell, work done, work in all

STAGES = ("allocate", "reparameterise", "compress", "direct", "recover", "evaluate", "diagnose", "profile")

_EVALUATE = (
    measuring.PerplexityRow,
    measuring.DivergenceRow,
    measuring.AccuracyRow,
    measuring.AnswerRow,
    measuring.LeftOutRow,
    measuring.NoEntropyRow,
    measuring.MacroAccuracyRow,
)
ROWS: dict[str, tuple[type, ...]] = {
    "allocate": (making.BudgetRow, making.SizeRow, making.CandidateRow, making.ContenderRow, making.TrialRow),
    "reparameterise": (making.BasesRow,),
    "compress": (making.SiteRow,),
    "direct": (*_EVALUATE, measuring.MacroDropRow, measuring.ModelSizeRow),
    "recover": (
        making.RateRow,
        making.LossRow,
        making.LocalLossRow,
        making.HeldOutRow,
        making.KeptRow,
        making.EarlyStopRow,
    ),
    "evaluate": _EVALUATE,
    "diagnose": (
        measuring.EntropyRow,
        measuring.PromptsRow,
        measuring.PairRow,
        measuring.DriftProfileRow,
        measuring.DriftMeanRow,
        measuring.MacroDropRow,
        measuring.ResidualRow,
        measuring.ResidualLastRow,
        measuring.SpectrumRow,
        measuring.SpectralGapRow,
        measuring.RestorationRow,
        measuring.TrackedEntryRow,
        measuring.SuperWeightRow,
        measuring.SuperWeightsRow,
        measuring.SensitivityRow,
    ),
    "profile": (measuring.ResourcesRow, measuring.LatencyRow),
    # beside the stages: what sweeps, comparisons and predictions write
    "cells": (making.CellRow,),
    "boundary": (making.BoundaryRow, making.DriftCrossingRow, making.ScalingTrendRow, making.ScalingRow),
    "comparison": (making.ComparedRow,),
    "predict": (making.SignalRow, making.PredictionRow),
}
