"""A block that works in few of its own coordinates: of the residual stream, of the values of its heads, of its neurons.

Shape letters: D hidden size, P coordinates of the residual stream that stay, F neurons, N neurons that stay, O
out_features, I in_features, H heads, G heads of keys and values, C channels of a head, R channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensormix.fitting.ranks import rank_for
from tensormix.fitting.whitening import best_on_inputs, check_inputs, gram_root, refit_left, refitted, widened
from tensormix.methods.base import Heads, Layer, Statistics, Symmetry, about
from tensormix.methods.neurons import check_parts, dense, neuron_bias, neuron_roles, unchanged, value_bias, with_bias
from tensormix.methods.rounded_parts import RoundedParts, through_noise
from tensormix.methods.rounding import Seen
from tensormix.operators import Dense, LowRank, Placed, StructuredLinear
from tensormix.statistics import Gram


class Narrow(RoundedParts):
    """Dense layers between the leading coordinates of both of their sides, as in a narrow model inside the wide one.

    A weight in the bases of its inputs and of its outputs, both sorted by energy, has most of its energy in a leading
    block: W ~ U_P C V_P^T, the core of a Tucker decomposition, holds far more of it than two thin factors of as many
    numbers. The bases cost nothing where the model has them already:
    residual stream: the first P = width D channels, for all layers that read or write it. They are the principal ones
    after `reparameterise.rotate_residual`, which the dense model does not notice; without it leave `width` at 1.
    v and o: of every head of values the R = keep / width C directions that o makes most of; then o by least squares.
    gate, up, down: the N = keep / width F neurons of which down puts out most; then down by least squares.
    q and k: two factors, the best on the inputs, since rotary positions fix the basis of their outputs.

    With `rounding` all of these are stored in integers; the directions of the values are chosen, and o is fitted, for
    values with the noise that rounding v adds to them.
    """

    source = "ours; cores as in Tucker, coordinates as in arXiv 2401.15024, heads as in arXiv 2505.23966"
    summary = "Dense cores between the leading coordinates of the residual stream, the values and the neurons."
    needs = (Gram,)

    roles_of_heads = ("v", "o")
    size = "keep"

    name: Literal["narrow"] = "narrow"
    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters that stays; 1 leaves the layers as they are
    width: float = Field(default=1.0, gt=0, le=1)  # fraction of the channels of the residual stream that are used

    @model_validator(mode="after")
    def _wide_enough(self) -> Narrow:
        if self.width < self.keep:
            raise ValueError(
                f"narrow: width={self.width} is below keep={self.keep}, so more neurons would have to stay than there "
                f"are; the smallest width is {self.keep}, the largest 1"
            )
        return self

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        return () if self.keep == 1 else ("mapped values", "neurons")

    def needs_at(self, role: str) -> tuple[type, ...]:
        return self.with_rounding((Gram,))

    def empty(self, shapes: Mapping[str, tuple[int, int]], heads: Heads | None) -> dict[str, StructuredLinear]:
        check_parts(self.name, shapes)
        with torch.device("meta"):
            return {role: self._operator(role, *shape, heads) for role, shape in shapes.items()}

    def _operator(self, role: str, O: int, I: int, heads: Heads | None) -> StructuredLinear:
        if self.keep == 1:
            return self.stored_empty(Dense(I, O))
        if role in ("q", "k"):
            with about(role):
                return self.stored_empty(LowRank(I, O, rank=rank_for("Narrow", self.keep, I, O)))
        if role in ("gate", "up"):
            return Placed(I, O, inner=self._core(self._channels(I), self._kept(O, I, "neurons")))
        if role == "down":
            return Placed(I, O, inner=self._core(self._kept(I, O, "neurons"), self._channels(O)))
        assert heads is not None
        (H, G, C), D = heads, I if role == "v" else O
        kept = self._kept(C, D, "channels of a head")
        if role == "v":
            return Placed(I, O, inner=self._core(self._channels(I), G * kept), out_groups=G)
        return Placed(I, O, inner=self._core(H * kept, self._channels(O)), in_groups=H)

    def _core(self, I: int, O: int) -> StructuredLinear:
        return self.stored_empty(Dense(I, O))

    def _channels(self, D: int) -> int:
        return max(1, round(self.width * D))

    def _kept(self, count: int, D: int, what: str) -> int:
        """How many of `count` may stay, so that with the channels of the residual stream `keep` of the numbers do."""
        width = self._channels(D) / D
        kept = min(count, floor(self.keep / width * count + 1e-9))  # the margin undoes the rounding of keep
        if kept < 1:
            smallest = ceil(width * 1e4 / count) / 1e4
            raise ValueError(
                f"Narrow: keep={self.keep} at width={self.width} leaves none of {count} {what}; the smallest usable "
                f"keep at this width is {smallest:.4f}"
            )
        return kept

    def fit(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], heads: Heads | None
    ) -> dict[str, StructuredLinear]:
        made: dict[str, StructuredLinear] = {}
        seen = {role: self.seen(stats.get(role), layer.weight) for role, layer in layers.items()}
        if self.keep == 1:
            return {role: self.stored(operator, seen[role]) for role, operator in unchanged(layers).items()}
        grams = {role: stats[role][Gram].mean for role in layers}
        for role in layers.keys() & {"q", "k"}:
            with about(role):
                layer = layers[role]
                rank = rank_for("Narrow", self.keep, *layer.weight.shape[::-1])
                factors = best_on_inputs(layer.weight, gram_root(grams[role]), rank)
                made[role] = with_bias(self.stored(factors, seen[role], layer.weight), layer.bias)
        if "o" in layers:
            assert heads is not None
            with about("o"):
                made |= self._values(layers["v"], layers["o"], grams, seen, heads)
        if "down" in layers:
            with about("down"):
                made |= self._neurons(layers, grams, seen)
        return {role: made[role] for role in layers}

    def _values(
        self, v: Layer, o: Layer, grams: Mapping[str, Tensor], seen: Mapping[str, Seen | None], heads: Heads
    ) -> dict[str, StructuredLinear]:
        (H, G, C), (D, I) = heads, (len(o.weight), v.weight.shape[1])
        P, kept = self._channels(D), self._kept(C, D, "channels of a head")
        target, noisy = o.weight[:P], grams["o"]
        if self.rounding is not None:
            target, noisy = through_noise(target, noisy, self.share_lost(v.weight, grams["v"], seen["v"]))
        wide, root = widened(target, gram_root(noisy))  # (P, H C), (H C, K)
        into, back = value_maps(wide, root @ root.T, heads, kept)  # (G, R, C), (G, C, R)
        every = torch.block_diag(*into.repeat_interleave(H // G, dim=0))  # (H R, H C)
        left = wide @ torch.block_diag(*back.repeat_interleave(H // G, dim=0))  # (P, H R)
        left = refit_left(wide, left, every, root)
        writer = self.stored(dense(o.weight, left), None if seen["o"] is None else seen["o"].through(every))
        theirs = Placed(H * C, D, inner=writer, in_groups=H).to(o.weight)
        read = self._reader(v.weight, grams["v"]).to(into).unflatten(0, (G, C))  # (G, C, P)
        reader = self.stored(dense(v.weight, (into @ read).flatten(0, 1)), _leading(seen["v"], P))
        ours = Placed(I, G * C, inner=reader, out_groups=G).to(v.weight)
        return {"v": with_bias(ours, value_bias(v.bias, into)), "o": with_bias(theirs, o.bias)}

    def _neurons(
        self, layers: Mapping[str, Layer], grams: Mapping[str, Tensor], seen: Mapping[str, Seen | None]
    ) -> dict[str, StructuredLinear]:
        down = layers["down"]
        D, F = down.weight.shape
        P = self._channels(D)
        chosen = loudest_neurons(down.weight[:P], grams["down"], self._kept(F, D, "neurons"))
        left = None if seen["down"] is None else seen["down"].chosen(chosen)
        inner = self.stored(dense(down.weight, refitted(down.weight[:P], grams["down"], chosen)), left)
        made: dict[str, StructuredLinear] = {"down": with_bias(Placed(F, D, inner=inner).to(down.weight), down.bias)}
        for role in set(neuron_roles(layers)) - {"down"}:
            weight = layers[role].weight
            inner = self.stored(dense(weight, self._reader(weight[chosen], grams[role])), _leading(seen[role], P))
            bias = neuron_bias(layers[role].bias, chosen)
            made[role] = with_bias(Placed(D, F, inner=inner).to(weight), bias)
        return made

    def _reader(self, weight: Tensor, gram: Tensor) -> Tensor:  # (O, D), (D, D) -> (O, P)
        """The best that can be made of the first P channels."""
        P = self._channels(weight.shape[1])
        if P == weight.shape[1]:
            return weight
        return refitted(weight, gram, torch.arange(P, device=weight.device))


def _leading(seen: Seen | None, count: int) -> Seen | None:
    """Of the first inputs alone."""
    return None if seen is None else seen.chosen(torch.arange(count))


def value_maps(weight: Tensor, gram: Tensor, heads: Heads, rank: int) -> tuple[Tensor, Tensor]:
    """For each head of values the A (R, C) and B (C, R) with which o(B A z) is nearest to o(z).

    With S S^T the Gram matrix of the channels z and K = W_o^T W_o, each summed over the query heads that share the
    values: A = V^T S^+ and B = S V, V the R leading eigenvectors of S^T K S. Where every head has its own values, no
    other rank R loses less of what o puts out for that head (Eckart and Young for W_o S).

    Args:
        weight: of o, (O, H C).
        gram: of the inputs of o, (H C, H C).
    """
    H, G, C = heads
    check_inputs(gram)
    each = gram.reshape(H, C, H, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (H, C, C)
    seen = each.unflatten(0, (G, H // G)).sum(1)
    parts = weight.unflatten(1, (G, H // G, C))  # (O, G, H / G, C)
    made_of = torch.einsum("oghc,oghd->gcd", parts, parts)
    values, vectors = torch.linalg.eigh(seen)
    values = torch.where(values > torch.finfo(gram.dtype).eps * C * values[:, -1:], values, 0)
    root = vectors * values.sqrt()[:, None]  # (G, C, C)
    inverse = (vectors * torch.where(values > 0, values, torch.inf).rsqrt()[:, None]).mT
    basis = torch.linalg.eigh(root.mT @ made_of @ root).eigenvectors[..., -rank:].flip(-1)  # (G, C, R)
    return basis.mT @ inverse, root @ basis


def loudest_neurons(weight: Tensor, gram: Tensor, count: int) -> Tensor:  # (O, F), (F, F) -> (count,)
    """The neurons of which down puts out most: by ||W[:, j]||^2 E[h_j^2], in ascending order."""
    check_inputs(gram)
    wide = weight.to(torch.promote_types(weight.dtype, gram.dtype))
    energy = wide.square().sum(0) * gram.diagonal().to(wide)
    return energy.topk(count).indices.sort().values
