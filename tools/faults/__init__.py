"""The table of faults, a file for each part of the package."""

from __future__ import annotations

from faults import measuring, methods, models, operators, runs, training
from faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *operators.FAULTS,
    *methods.FAULTS,
    *models.FAULTS,
    *training.FAULTS,
    *measuring.FAULTS,
    *runs.FAULTS,
)
