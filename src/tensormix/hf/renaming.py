"""transformers renames and merges tensors of files; those of operators are left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, apply_renamings

from tensormix.operators import outermost


class OwnNames(WeightRenaming):
    """Gives tensors their names back, where a rule that is meant for dense ones has hit them: renamed -> own name."""

    __slots__ = ("names",)

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__("", "")
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        name = self.names.get(source_key)
        if name is None:
            return source_key, None
        self._was_used = True
        return name, source_key

    def reverse_transform(self) -> OwnNames:
        return OwnNames({name: renamed for renamed, name in self.names.items()})


def own_names(model: nn.Module, conversions: Iterable[Any]) -> list[OwnNames]:
    """What has to follow the `conversions` of a model with operators; nothing if they leave the operators alone."""
    # Copies, because a rule notes that it was used, and is turned back when the model is saved.
    rules = copy.deepcopy([entry for entry in conversions if isinstance(entry, WeightRenaming)])
    if not rules:
        return []
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, str] = {}
    for operator, part in outermost(model):
        for leaf in part.state_dict():
            own = f"{operator}.{leaf}"
            for name in {own, own.removeprefix(prefix), prefix + own}:  # a bare model, and one with a head
                renamed = apply_renamings(name, rules)
                if renamed != name:
                    names[renamed] = name
    return [OwnNames(names)] if names else []


def keep_apart(model: Any) -> None:
    """Have a model saved without the conversions that would merge tensors of operators, or dense ones with them.

    What such a conversion leaves apart lies in the file under the model's own names, which are read without it.
    """
    found = getattr(model, "_weight_conversions", None)
    if found is None:  # as transformers does when it saves a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        found = [entry for entry in found if not isinstance(entry, PrefixChange)]
    names = {
        f"{operator}.{leaf}" for operator, part in outermost(model) for leaf in ("weight", "bias", *part.state_dict())
    }
    kept = [entry for entry in found if not (isinstance(entry, WeightConverter) and _merges(entry, names))]
    if len(kept) < len(found):
        model._weight_conversions = kept


def _merges(conversion: WeightConverter, names: Iterable[str]) -> bool:
    backwards = conversion.reverse_transform()
    return any(backwards.rename_source_key(name)[1] is not None for name in names)
