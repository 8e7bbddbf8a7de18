"""Fewer neurons, fewer channels in each head.

Shape letters: O out_features, I in_features, K directions of the inputs, H heads, G heads of keys and values,
C channels of a head, R channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.ranks import rank_for
from tensormix.fitting.whitening import check_inputs, gram_root, output_basis, refitted, widened
from tensormix.methods.base import Heads, Layer, Statistics, Symmetry, about
from tensormix.methods.neurons import check_parts, dense, neuron_bias, neuron_roles, unchanged, value_bias, with_bias
from tensormix.methods.rounded_parts import RoundedParts
from tensormix.methods.rounding import Seen
from tensormix.operators import Dense, PerHead, Placed, StructuredLinear
from tensormix.statistics import Gram


class FlatLlm(RoundedParts):
    """Principal components of every head, and the neurons that the others cannot stand in for.

    v and o: the leading R eigenvectors Q of the Gram matrix of a head's outputs, summed over the heads that share keys
    and values; v becomes Q^T W_v and o becomes W_o Q. No other R directions lose less of what the heads put out. (The
    paper takes the Gram matrix of the outputs of v, before attention has averaged them.)
    q and k: for every head the best rank on the inputs, Q Q^T W; the outputs keep their channels, so that rotary
    positions and norms act as before, and the rank is what two factors of each head may hold.
    gate, up, down: neurons by their ridge leverage score in the Gram matrix of the inputs of down; then down by least
    squares (Nystroem), so that the neurons that stay make up for those that go.
    """

    source = "arXiv 2505.23966"
    summary = "Principal components of the heads, and the least replaceable neurons with a refitted down projection."
    needs = (Gram,)

    roles_of_heads = ("v", "o")
    size = "keep"

    name: Literal["flat_llm"] = "flat_llm"
    keep: float = Field(gt=0, le=1)  # fraction of the dense parameters that stays; 1 leaves the layers as they are
    ridge: float = Field(default=1e-6, gt=0, allow_inf_nan=False)  # in the scores, times the mean squared input

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        return () if self.keep == 1 else ("turned values", "neurons")

    def needs_at(self, role: str) -> tuple[type, ...]:
        return self.with_rounding((Gram,) if role in ("q", "k", "o", "down") else ())

    def empty(self, shapes: Mapping[str, tuple[int, int]], heads: Heads | None) -> dict[str, StructuredLinear]:
        check_parts(self.name, shapes)
        with torch.device("meta"):
            return {role: self._operator(role, *shape, heads) for role, shape in shapes.items()}

    def _operator(self, role: str, O: int, I: int, heads: Heads | None) -> StructuredLinear:
        if self.keep == 1:
            return self.stored_empty(Dense(I, O))
        if role in ("gate", "up"):
            return Placed(I, O, inner=self.stored_empty(Dense(I, self._kept(O, "neurons"))))
        if role == "down":
            return Placed(I, O, inner=self.stored_empty(Dense(self._kept(I, "neurons"), O)))
        assert heads is not None
        if role in ("v", "o"):
            kept = self._kept(heads.head_dim, "channels of a head")
            if role == "v":
                core = self.stored_empty(Dense(I, heads.num_kv_heads * kept))
                return Placed(I, O, inner=core, out_groups=heads.num_kv_heads)
            core = self.stored_empty(Dense(heads.num_heads * kept, O))
            return Placed(I, O, inner=core, in_groups=heads.num_heads)
        num_heads = O // heads.head_dim
        with about(role):
            rank = rank_for("FlatLlm", self.keep, I, heads.head_dim)
        return self.stored_empty(PerHead(I, O, num_heads=num_heads, rank=rank))

    def _kept(self, count: int, what: str) -> int:
        kept = floor(self.keep * count + 1e-9)  # the margin undoes the rounding of keep
        if kept < 1:
            smallest = ceil(1e4 / count) / 1e4
            raise ValueError(
                f"FlatLlm: keep={self.keep} leaves none of {count} {what}; the smallest usable keep is {smallest:.4f}, "
                "the largest 1"
            )
        return kept

    def fit(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], heads: Heads | None
    ) -> dict[str, StructuredLinear]:
        made: dict[str, StructuredLinear] = {}
        seen = {role: self.seen(stats.get(role), layer.weight) for role, layer in layers.items()}
        if self.keep == 1:
            return {role: self.stored(operator, seen[role]) for role, operator in unchanged(layers).items()}
        for role in layers.keys() & {"q", "k"}:
            assert heads is not None
            with about(role):
                made[role] = self._heads_alone(layers[role], stats[role][Gram].mean, heads.head_dim, seen[role])
        if "o" in layers:
            assert heads is not None
            with about("o"):
                made |= self._values(layers["v"], layers["o"], stats["o"][Gram].mean, heads, seen)
        if "down" in layers:
            with about("down"):
                made |= self._neurons(layers, stats["down"][Gram].mean, seen)
        return {role: made[role] for role in layers}

    def _heads_alone(self, layer: Layer, gram: Tensor, head_dim: int, seen: Seen | None) -> StructuredLinear:  # (I, I)
        rank = rank_for("FlatLlm", self.keep, layer.weight.shape[1], head_dim)
        wide, root = widened(layer.weight, gram_root(gram))
        parts = wide.split(head_dim)
        left = torch.stack([output_basis(part, root, rank) for part in parts])
        right = torch.stack([basis.T @ part for basis, part in zip(left, parts, strict=True)])
        operator = PerHead.from_factors(layer.weight, left, right)
        return with_bias(self.stored(operator, seen, layer.weight), layer.bias)

    def _values(
        self, v: Layer, o: Layer, gram: Tensor, heads: Heads, seen: Mapping[str, Seen | None]
    ) -> dict[str, StructuredLinear]:  # (I, I)
        (H, G, C), kept = heads, self._kept(heads.head_dim, "channels of a head")
        bases = head_bases(gram, heads, kept)  # (G, C, R)
        wide = bases.to(torch.promote_types(bases.dtype, v.weight.dtype))
        turned = wide.mT @ v.weight.to(wide).unflatten(0, (G, C))  # (G, R, I)
        read = o.weight.to(wide).unflatten(1, (H, C)).transpose(0, 1)  # (H, O, C)
        read = (read @ wide.repeat_interleave(H // G, dim=0)).transpose(0, 1).flatten(1)  # (O, H R)
        I, O = v.weight.shape[1], o.weight.shape[0]
        core = self.stored(dense(v.weight, turned.flatten(0, 1)), seen["v"])
        ours = Placed(I, G * C, inner=core, out_groups=G).to(v.weight)
        turn = torch.block_diag(*wide.mT.repeat_interleave(H // G, dim=0))  # (H R, H C)
        core = self.stored(dense(o.weight, read), None if seen["o"] is None else seen["o"].through(turn))
        theirs = Placed(H * C, O, inner=core, in_groups=H).to(o.weight)
        return {"v": with_bias(ours, value_bias(v.bias, wide.mT)), "o": with_bias(theirs, o.bias)}

    def _neurons(
        self, layers: Mapping[str, Layer], gram: Tensor, seen: Mapping[str, Seen | None]
    ) -> dict[str, StructuredLinear]:  # (I, I)
        down = layers["down"]
        chosen = leading_neurons(gram, self._kept(down.weight.shape[1], "neurons"), self.ridge)
        made: dict[str, StructuredLinear] = {}
        for role in neuron_roles(layers):
            weight, bias = layers[role].weight, layers[role].bias
            if role == "down":
                inputs = seen[role]
                left = None if inputs is None else inputs.chosen(chosen)
                inner = self.stored(dense(weight, refitted(weight, gram, chosen)), left)
                made[role] = with_bias(Placed(*weight.shape[::-1], inner=inner).to(weight), bias)
                continue
            inner = self.stored(dense(weight, weight[chosen]), seen[role])
            made[role] = with_bias(Placed(*weight.shape[::-1], inner=inner).to(weight), neuron_bias(bias, chosen))
        return made


def head_bases(gram: Tensor, heads: Heads, rank: int) -> Tensor:  # (H C, H C) -> (G, C, R)
    """For each head of keys and values the R orthonormal directions that hold most of what its query heads put out.

    Raises:
        ValueError: `gram` is zero or not finite.
    """
    H, G, C = heads
    check_inputs(gram)
    each = gram.reshape(H, C, H, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (H, C, C)
    return torch.linalg.eigh(each.unflatten(0, (G, H // G)).sum(1)).eigenvectors[..., -rank:].flip(-1)


def leading_neurons(gram: Tensor, count: int, ridge: float) -> Tensor:  # (I, I) -> (count,)
    """The neurons with the largest scores diag(G (G + ridge mean(diag G))^-1), in ascending order.

    Neurons that are nearly always zero, or nearly a combination of others, have small ones.
    """
    check_inputs(gram)
    damping = ridge * gram.diagonal().mean()
    damped = gram.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0)
        scores = vectors.square() @ (values / (values + damping))
    else:
        scores = 1 - damping * torch.cholesky_inverse(factor).diagonal()
    return scores.topk(count).indices.sort().values
