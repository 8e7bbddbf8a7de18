"""The neurons that carry most of the activation stay dense, all other weights become low rank.

Shape letters: O out_features, I in_features, P prime neurons, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import ceil, floor, fsum, inf
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from tensormix.fitting.divide import SiteOptions, by_spectrum, low_rank
from tensormix.fitting.whitening import best_on_inputs, gram_root, whitened_spectrum
from tensormix.methods.base import Heads, JointMethod, Layer, Statistics, Symmetry, about
from tensormix.methods.neurons import check_together, dense, neuron_roles, with_bias
from tensormix.operators import Concat, Dense, LowRank, StructuredLinear
from tensormix.statistics import Gram, InputMagnitudes

Shapes = Mapping[str, tuple[int, int]]  # role -> (O, I)
_NEURONS = ("gate", "up", "down")


class Ranks(BaseModel):
    """One rank for each role, of what is not prime in it; a role without one stays dense."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    q: int | None = Field(default=None, ge=1)
    k: int | None = Field(default=None, ge=1)
    o: int | None = Field(default=None, ge=1)
    gate: int | None = Field(default=None, ge=1)
    up: int | None = Field(default=None, ge=1)
    down: int | None = Field(default=None, ge=1)


class Sola(JointMethod):
    """Soft activation sparsity and low rank: some neurons are prime, the other weights get the best rank on the inputs.

    The prime neurons have the largest mean |input of down|. They come first, and their rows of gate and up and columns
    of down stay dense; the rest of these matrices, q, k and o become factors with the smallest error on the inputs
    (SVD-LLM). v is left as it is.

    The ranks share what `keep` leaves: each next step of `granularity` ranks goes where it lowers the sum of the
    relative squared errors most per parameter (marginal analysis, which is optimal where all steps cost the same), for
    the best choice of the layers that stay dense. This is the aim that the paper states. The released code has
    fixed ranks instead, one for each role: that is `ranks`.

    Raises ValueError unless exactly one of `keep` and `ranks` is given.
    """

    source = "SoLA (AAAI 2025); ranks by marginal analysis, or fixed as in its released code"
    summary = "The most active neurons stay dense, all else but v becomes low rank, the ranks shared out in each block."
    needs = (Gram, InputMagnitudes)

    roles_of_heads = ()
    size = "keep"

    name: Literal["sola"] = "sola"
    keep: float | None = Field(default=None, gt=0, le=1)  # fraction of the dense parameters of all its layers, v too
    ranks: Ranks | None = None  # instead of `keep`
    prime: float = Field(default=0.15, ge=0, le=1)  # fraction of the neurons that stay dense
    granularity: int = Field(default=32, ge=1)  # ranks are multiples of it, or of an eighth of the largest if less
    ridge: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # added to Gram matrices, times the mean eigenvalue

    @model_validator(mode="after")
    def _one_of_both(self) -> Sola:
        if (self.keep is None) == (self.ranks is None):
            raise ValueError("sola needs either keep (a fraction, shared out by spectrum) or ranks (one for each role)")
        return self

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        return ("neurons",)

    def needs_at(self, role: str) -> tuple[type, ...]:
        return {"v": (), "down": (Gram, InputMagnitudes)}.get(role, (Gram,))

    def empty(self, shapes: Shapes, heads: Heads | None) -> dict[str, StructuredLinear]:
        """With `keep` the ranks depend on the data: these are those of equal spectra, within the same budget."""
        check_together(self.name, shapes, neuron_roles(shapes))
        sizes = {role: min(self._marginal(role, shape)) for role, shape in shapes.items() if role != "v"}
        flat = {role: torch.ones(size) for role, size in sizes.items() if size}
        ranks = self._ranks(shapes, flat)
        with torch.device("meta"):
            return {role: self._operator(role, shape, ranks[role]) for role, shape in shapes.items()}

    def _operator(self, role: str, shape: tuple[int, int], rank: int | None) -> StructuredLinear:
        (O, I), (rows, columns) = shape, self._marginal(role, shape)
        if rank is None:
            return Dense(I, O)
        rest = LowRank(columns, rows, rank=rank)
        if (rows, columns) == shape:
            return rest
        prime = Dense(I - columns, O) if role == "down" else Dense(I, O - rows)
        return Concat(parts=[prime, rest], axis="in" if role == "down" else "out")

    def fit(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], heads: Heads | None
    ) -> dict[str, StructuredLinear]:
        shapes = {role: (layer.weight.shape[0], layer.weight.shape[1]) for role, layer in layers.items()}
        num_prime, order = 0, torch.empty(0)
        if "down" in layers:
            magnitudes = stats["down"][InputMagnitudes].mean
            num_prime = self._num_prime(len(magnitudes))
            order = prime_first(magnitudes, num_prime)
        roots = self._roots(layers, stats, order[num_prime:])
        layers = {role: _ordered(role, layer, order) for role, layer in layers.items()}
        rest = {role: _marginal_of(role, layers[role].weight, num_prime) for role in roots}
        if self.ranks is None:
            spectra = {role: whitened_spectrum(rest[role], root) for role, root in roots.items() if rest[role].numel()}
            ranks = self._ranks(shapes, spectra)
        else:
            ranks = self._ranks(shapes, {})
        made: dict[str, StructuredLinear] = {}
        for role, layer in layers.items():
            weight, rank = layer.weight, ranks[role]
            if rank is None:
                operator: StructuredLinear = dense(weight, weight)
            else:
                with about(role):
                    operator = best_on_inputs(rest[role], roots[role], rank)
                if rest[role].shape != weight.shape:
                    axis = 1 if role == "down" else 0
                    first = weight.narrow(axis, 0, num_prime)
                    operator = Concat(parts=[dense(weight, first), operator], axis="in" if axis else "out").to(weight)
            made[role] = with_bias(operator, layer.bias)
        return made

    def _roots(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], marginal: Tensor
    ) -> dict[str, Tensor]:
        """Role -> square root of the Gram matrix (I, K) of the inputs of what is not prime."""
        made: dict[int, Tensor] = {}
        roots = {}
        for role in layers:
            if role == "v" or (role == "down" and len(marginal) == 0):
                continue
            seen = stats[role][Gram]
            if id(seen) not in made:
                with about(role):
                    gram = seen.mean[marginal][:, marginal] if role == "down" else seen.mean
                    made[id(seen)] = gram_root(gram, self.ridge)
            roots[role] = made[id(seen)]
        return roots

    def _num_prime(self, num_neurons: int) -> int:
        return floor(self.prime * num_neurons + 1e-9)  # the margin undoes the rounding of prime

    def _marginal(self, role: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of what is not prime."""
        O, I = shape
        if role == "down":
            return O, I - self._num_prime(I)
        return (O - self._num_prime(O), I) if role in _NEURONS else shape

    def _ranks(self, shapes: Shapes, spectra: Mapping[str, Tensor]) -> dict[str, int | None]:
        """The rank of what is not prime in each layer; None for one that stays dense."""
        ranks: dict[str, int | None] = dict.fromkeys(shapes)
        if self.ranks is not None:
            for role, shape in shapes.items():
                rank = getattr(self.ranks, role, None)
                limit = min(self._marginal(role, shape))
                if rank is not None and rank > limit:
                    with about(role):
                        raise ValueError(f"sola: rank {rank} is more than the {limit} that the layer allows there")
                ranks[role] = rank
            return ranks
        options = [self._options(role, shapes[role], spectrum) for role, spectrum in spectra.items()]
        total = sum(O * I for O, I in shapes.values())
        fixed = total - sum(site.dense_cost for site in options)  # v and what is prime
        cheapest = fixed + sum(site.allowed[0].cost for site in options)
        room = floor((self.keep or 0) * total + 1e-6)
        if room < cheapest:
            smallest = ceil(cheapest / total * 1e4) / 1e4
            raise ValueError(
                f"sola: keep={self.keep} cannot be met with prime={self.prime} and v dense: the smallest possible keep "
                f"is {smallest}, the largest 1"
            )
        return ranks | shared_out(options, room - fixed)

    def _options(self, role: str, shape: tuple[int, int], spectrum: Tensor) -> SiteOptions:
        rows, columns = self._marginal(role, shape)
        largest = rows * columns // (rows + columns)
        if largest < 1:  # too small for any rank
            return SiteOptions(role, rows * columns, excluded=True)
        step = max(1, min(self.granularity, largest // 8))
        return low_rank(role, spectrum.tolist(), columns, rows, relative=True, granularity=step)


def shared_out(sites: Sequence[SiteOptions], budget: int) -> dict[str, int | None]:
    """The rank of each site, None for dense, with the smallest sum of errors within the budget.

    Between the largest rank that pays and the dense weight there is nothing, which a greedy choice cannot foresee. So
    it is made for every set of sites that could be dense (at most 2^6 of them in a block), and the best one is taken.
    """
    best, least = dict.fromkeys(site.name for site in sites), inf
    for dense_ones in product((True, False), repeat=len(sites)):
        tried = [replace(site, excluded=site.excluded or alone) for site, alone in zip(sites, dense_ones, strict=True)]
        if sum(site.allowed[0].cost for site in tried) > budget:
            continue
        if all(site.excluded for site in tried):
            return best
        chosen = by_spectrum(tried, budget)
        error = fsum(option.error for option in chosen.values())
        if error < least:
            best, least = {name: option.size for name, option in chosen.items()}, error
    return best


def prime_first(magnitudes: Tensor, num_prime: int) -> Tensor:  # (I,) -> (I,)
    """An order of the neurons: the `num_prime` largest, then the others, each in the order that they had."""
    prime = torch.zeros(len(magnitudes), dtype=torch.bool, device=magnitudes.device)
    prime[magnitudes.topk(num_prime).indices] = True
    return torch.cat([prime.nonzero().flatten(), (~prime).nonzero().flatten()])


def _ordered(role: str, layer: Layer, order: Tensor) -> Layer:
    if role == "down":
        return Layer(layer.weight[:, order], layer.bias)
    if role in _NEURONS:
        return Layer(layer.weight[order], None if layer.bias is None else layer.bias[order])
    return layer


def _marginal_of(role: str, weight: Tensor, num_prime: int) -> Tensor:  # (O, I)
    if role == "down":
        return weight[:, num_prime:]
    return weight[num_prime:] if role in _NEURONS else weight
