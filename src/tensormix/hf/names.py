"""Names of operators' tensors that transformers takes for the weights of dense layers when it reads them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.core_model_loading import WeightRenaming

from tensormix.operators import outermost


class KeptNames(WeightRenaming):
    """After the renamings of transformers: `operator.weight.left` is `operator.left` again.

    Where a checkpoint holds the weight of a layer under the name of the layer alone, `weight` is put behind that name.
    Nothing has to be done when the model is saved.

    Args:
        operators: names of the operators, each with and without what stands before them in a model with a head.
    """

    __slots__ = ("operators",)

    def __init__(self, operators: frozenset[str] = frozenset()) -> None:
        super().__init__("(?!)", "(?!)")  # matches nothing
        self.operators = operators

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        operator, found, leaf = source_key.rpartition(".weight.")
        return (f"{operator}.{leaf}" if found and operator in self.operators else source_key), None

    def reverse_transform(self) -> KeptNames:
        return KeptNames()


def kept_names(model: Any) -> list[KeptNames]:
    """One entry for all operators of the model; none for a model without."""
    names = [name for name, operator in outermost(model) if isinstance(operator, nn.Module)]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {other for name in names for other in (name, name.removeprefix(prefix), f"{prefix}{name}")}
    return [KeptNames(frozenset(known))] if names else []
