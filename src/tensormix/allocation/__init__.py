"""One budget for a whole model: what each site could become, and which size it gets."""

from tensormix.allocation.allocate import allocate
from tensormix.allocation.outcome import Allocation, ImpossibleBudget
from tensormix.allocation.ways import WAYS

__all__ = ["WAYS", "Allocation", "ImpossibleBudget", "allocate"]
