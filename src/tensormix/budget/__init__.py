"""One budget for a whole model: what each site could become, and which size it gets."""

from tensormix.budget.budget import allocate
from tensormix.budget.outcome import Allocation, ImpossibleBudget
from tensormix.budget.ways import WAYS

__all__ = ["WAYS", "Allocation", "ImpossibleBudget", "allocate"]
