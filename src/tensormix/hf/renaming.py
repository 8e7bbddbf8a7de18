"""transformers renames tensors when it loads them; those of operators keep their names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightRenaming, apply_renamings

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
