"""One budget for a whole model: what each site could become, and which size it gets."""

from tensormix.budget.budget import WAYS, Allocation, ImpossibleBudget, allocate

__all__ = ["WAYS", "Allocation", "ImpossibleBudget", "allocate"]
