"""Neurons that compression removed are zeros between the layers of an MLP; here they are not even written.

Shape letters: D hidden size, F neurons, N neurons that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tensormix.inference.siblings import is_watched
from tensormix.operators import Placed
from tensormix.rows import Row
from tensormix.sites import role_of

ROLES = ("gate", "up", "down")
Layers = dict[str, tuple[str, nn.Module]]


@contextmanager
def without_zeros(model: nn.Module) -> Iterator[list[Row]]:
    """Inside, the layers of an MLP whose neurons were removed (by `narrow` or `flat_llm`) hand on only those left.

    gate and up, or up alone, put out the N neurons that stay instead of F with zeros among them, and down reads N: the
    same numbers, without writing the zeros, activating them and skipping them again.

    The parameters stay the very same ones under the same names: saving, loading and training work inside as outside.
    What reads the neurons from outside finds N of them. Patches (`recover` with `parameters: lora`) are made outside.

    Yields:
        One row per module with such layers: module, layers (their names in it), neurons (N), of (F), chosen
        ("without" or "as it is"), why (it is as it is).
    """
    replaced: list[tuple[nn.Module, str, Placed]] = []
    rows: list[Row] = []
    try:
        for path, parent in list(model.named_modules()):
            layers = _neuron_layers(path, parent)
            if not any(isinstance(layer, Placed) for _, layer in layers.values()):
                continue
            why = _why_not(layers)
            row: Row = {"module": path, "layers": [name for name, _ in layers.values()]}
            rows.append(row | {"chosen": "as it is" if why else "without", "why": why} | _counts(layers))
            for role, (name, layer) in layers.items() if not why else ():
                assert isinstance(layer, Placed)
                replaced.append((parent, name, layer))
                setattr(parent, name, Kept(layer, reads=role == "down"))
        yield rows
    finally:
        for parent, name, layer in replaced:
            kept = getattr(parent, name)
            if isinstance(kept, Kept):  # else something was installed there inside
                layer.bias = kept.bias
                setattr(parent, name, layer.train(kept.training))


class Kept(Placed):
    """A layer of an MLP that puts out, or reads, the neurons that stay and no others.

    It has the parameters of the layer that it stands for, the whole bias too, and is described as that layer.
    """

    def __init__(self, layer: Placed, *, reads: bool) -> None:
        I, O = (layer.inner.in_features, layer.out_features) if reads else (layer.in_features, layer.inner.out_features)
        super().__init__(
            I, O, inner=layer.inner, in_groups=1 if reads else layer.in_groups, out_groups=layer.out_groups
        )
        self.train(layer.training)
        self.bias, self._spec = layer.bias, layer.spec

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., N), or (..., N) -> (..., D)
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias[: self.out_features]

    @property
    def spec(self) -> dict[str, Any]:
        return self._spec


def _neuron_layers(path: str, parent: nn.Module) -> Layers:
    """What puts out or reads neurons among the children of `parent`: role -> its name and the layer."""
    names = {role_of(f"{path}.{name}"): name for name, _ in parent.named_children()}
    return {role: (names[role], parent.get_submodule(names[role])) for role in ROLES if role in names}


def _counts(layers: Layers) -> dict[str, int]:
    """N and F, as the first layer that is not whole has them."""
    role, layer = next((role, layer) for role, (_, layer) in layers.items() if isinstance(layer, Placed))
    if role == "down":
        return {"neurons": layer.inner.in_features, "of": layer.in_features}
    return {"neurons": layer.inner.out_features, "of": layer.out_features}


def _why_not(layers: Layers) -> str:
    """Why the layers cannot do without; empty if they can."""
    if any(isinstance(layer, Kept) for _, layer in layers.values()):
        return "they do without already"
    if "up" not in layers or "down" not in layers:
        return "gate and up are one layer, or stand in another module"
    whole = [name for name, layer in layers.values() if type(layer) is not Placed]
    if whole:
        return f"{', '.join(whole)} has all neurons"
    placed = {role: layer for role, (_, layer) in layers.items() if isinstance(layer, Placed)}
    if any((layer.in_groups if role == "down" else layer.out_groups) > 1 for role, layer in placed.items()):
        return "the neurons are in groups"
    kept = {layer.inner.in_features if role == "down" else layer.inner.out_features for role, layer in placed.items()}
    if len(kept) > 1:
        return "the layers keep different neurons"
    if any(is_watched(layer) or "forward" in vars(layer) for layer in placed.values()):
        return "hooks or a forward of its own would be passed over"
    return ""
