"""How far the residual stream of a compressed model has turned and shrunk (arXiv 2606.03465, Fig. 5 and 19).

Layers are those of the geometry diagnostic: layer l is what leaves block l, layer 0 the embeddings.

Legend: N tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tensormix.diagnose.base import Batches, Diagnostic, Row, run
from tensormix.diagnose.geometry import observe
from tensormix.evaluate.forward import quiet
from tensormix.sites import blocks, is_replacement


class ResidualStream(Diagnostic):
    """Angle to the dense residual stream and ratio of lengths, after every block and after the last compressed one.

    Rows of kind "residual", one for each layer, and one of kind "residual_last" if a block is compressed: means over
    all tokens of the angle (degrees) and of ||compressed|| / ||dense||. A token whose state has length zero in either
    model has no angle; `num_tokens` counts the others.

    Raises ValueError without a reference or batches, for models of different depth, and where no token is left.
    """

    looks_at: ClassVar[Literal["dense", "pair"]] = "pair"
    needs: ClassVar[tuple[str, ...]] = ("batches", "reference")
    name: Literal["residual_stream"] = "residual_stream"

    def measure(self, model: nn.Module, batches: Batches, reference: nn.Module) -> list[Row]:
        layers, dense_layers = blocks(model), blocks(reference)
        if len(dense_layers) != len(layers):
            raise ValueError(
                f"{self.name}: this model has {len(layers)} blocks and the dense reference {len(dense_layers)}; "
                "the reference must be the same model before compression"
            )
        sums = torch.zeros(len(layers) + 1, 3, dtype=torch.float64)  # angle, ratio, tokens
        for ids in batches:
            for layer, (own, other) in enumerate(zip(_states(model, ids), _states(reference, ids), strict=True)):
                sums[layer] += _compared(own, other)
        if not bool((sums[:, 2] > 0).all()):
            raise ValueError(f"{self.name}: at layer {int(sums[:, 2].argmin())} every hidden state has length zero")
        means = (sums[:, :2] / sums[:, 2:]).tolist()
        rows = [
            {"kind": "residual", "layer": layer, "angle": angle, "norm_ratio": ratio, "num_tokens": int(sums[layer, 2])}
            for layer, (angle, ratio) in enumerate(means)
        ]
        last = last_compressed(model)
        return rows if last is None else [*rows, {**rows[last + 1], "kind": "residual_last", "block": last}]


def last_compressed(model: nn.Module) -> int | None:
    """The index of the last block that was replaced, or that holds an operator; None if none does."""
    touched = [index for index, block in enumerate(blocks(model)) if any(map(is_replacement, block.modules()))]
    return max(touched, default=None)


def _states(model: nn.Module, ids: Tensor) -> list[Tensor]:  # (B, T) -> (N, D) for each layer
    seen: dict[int, Tensor] = {}
    with quiet(model), observe(blocks(model), seen):
        run(model, ids)
    return [seen[layer].flatten(0, 1) for layer in sorted(seen)]


def _compared(own: Tensor, dense: Tensor) -> Tensor:  # (N, D), (N, D) -> (3,)
    """Sum of the angles (degrees), sum of the ratios, and number of tokens."""
    own, dense = own.double().cpu(), dense.double().cpu()
    size, other = own.norm(dim=1), dense.norm(dim=1)
    both = (size > 0) & (other > 0)
    left, right = own[both] / size[both, None], dense[both] / other[both, None]
    # Kahan's formula is exact for small angles, where the arc cosine loses half of its digits
    angle = 2 * torch.atan2((left - right).norm(dim=1), (left + right).norm(dim=1))
    return torch.stack([angle.rad2deg().sum(), (size / other)[both].sum(), both.sum().double()])
