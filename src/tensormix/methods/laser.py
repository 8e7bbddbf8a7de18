"""Rank reduction of single layers, and the search that chooses the layers.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensormix.fitting.ranks import no_factors
from tensormix.methods.base import LinearMethod, Statistics
from tensormix.operators import LowRank
from tensormix.operators.base import computing_dtype

Score = Callable[[Mapping[str, float]], tuple[float, float]]  # site -> keep_rank; gives accuracy and log-loss


class Laser(LinearMethod):
    """The truncated SVD of rank int(keep_rank * min(O, I)), stored as two factors.

    The paper takes a randomised SVD and writes a dense matrix back, which saves nothing; this is the exact one, and
    ranks whose factors would store as much as the dense weight are refused. Which sites get it is for `laser_search`.
    """

    source = "arXiv 2312.13558"
    summary = "Two thin factors from the truncated singular value decomposition, at a fraction of the largest rank."

    size = "keep_rank"
    largest = 1.0

    name: Literal["laser"] = "laser"
    keep_rank: float = Field(gt=0, le=1)  # fraction of the largest rank to keep, rho of the paper

    def allowed_sizes(self, in_features: int, out_features: int) -> tuple[float, ...]:
        full, largest = min(in_features, out_features), (in_features * out_features - 1) // (in_features + out_features)
        return tuple(_fraction(rank, full) for rank in range(1, largest + 1))

    def spectrum(self, weight: Tensor, stats: Statistics) -> Tensor:  # (O, I) -> (K,)
        return torch.linalg.svdvals(weight.detach().to(computing_dtype(weight)))

    def empty(self, in_features: int, out_features: int) -> LowRank:
        with torch.device("meta"):
            return LowRank(in_features, out_features, rank=self.rank(in_features, out_features))

    def fit(self, weight: Tensor, stats: Statistics) -> LowRank:  # (O, I)
        return LowRank.from_dense(weight.detach(), rank=self.rank(weight.shape[1], weight.shape[0]))

    def rank(self, in_features: int, out_features: int) -> int:
        """int(keep_rank * min(O, I)).

        Raises:
            ValueError: that is 0, or its factors store as much as the dense weight or more.
        """
        dense, full = in_features * out_features, min(in_features, out_features)
        largest = (dense - 1) // (in_features + out_features)
        if largest == 0:
            raise ValueError(f"Laser: {no_factors(in_features, out_features)}")
        rank = int(self.keep_rank * full + 1e-9)  # the margin undoes the rounding of keep_rank
        if rank == 0:
            raise ValueError(
                f"Laser: keep_rank={self.keep_rank} leaves no rank for a {in_features}x{out_features} layer; "
                f"the smallest usable keep_rank is {_fraction(1, full)}."
            )
        if rank > largest:
            stored = rank * (in_features + out_features)
            raise ValueError(
                f"Laser: keep_rank={self.keep_rank} is rank {rank} for a {in_features}x{out_features} layer, which "
                f"stores {stored} numbers, the dense weight {dense}; the largest rank that stores less is {largest} "
                f"(keep_rank={_fraction(largest, full)})."
            )
        return rank

    @staticmethod
    def search(candidates: Sequence[tuple[str, float]], score: Score) -> tuple[dict[str, float], list[Trial]]:
        return laser_search(candidates, score)


def _fraction(rank: int, full: int) -> float:
    return ceil(rank / full * 1e6) / 1e6


@dataclass(frozen=True)
class Trial:
    """One set of choices and what it scored."""

    choices: Mapping[str, float]  # site -> keep_rank; empty is the dense model
    accuracy: float
    log_loss: float

    @property
    def goodness(self) -> tuple[float, float]:
        return self.accuracy, -self.log_loss


def laser_search(candidates: Sequence[tuple[str, float]], score: Score) -> tuple[dict[str, float], list[Trial]]:
    """Which sites to reduce, and how far: the selection of LASER with its greedy composition over sites.

    Scores the dense model, then every candidate alone. The best candidate of each site is then added to what is chosen
    so far, beginning with the site that did best alone, and stays if the score rises. Better is the higher accuracy,
    then the lower log-loss; between equals the smaller set wins, then the earlier candidate. Nothing is scored twice:
    at most 1 + number of candidates + number of sites - 1 evaluations.

    Args:
        candidates: (site, keep_rank) pairs to try.
        score: accuracy and log-loss of the model with these sites reduced, on the part of the task that is for
            choosing (the paper takes the first 20 %); report on the rest.

    Returns:
        The chosen keep_rank of each site, empty if nothing beats the dense model; all trials in the order of scoring.

    Raises:
        ValueError: there are no candidates, one stands there twice, or a score is not finite.
    """
    _check_candidates(candidates)
    dense = _try({}, score)
    alone = [_try({site: rate}, score) for site, rate in candidates]
    best: dict[str, Trial] = {}  # site -> its best candidate
    for (site, _), trial in zip(candidates, alone, strict=True):
        if site not in best or trial.goodness > best[site].goodness:
            best[site] = trial
    trace, chosen = [dense, *alone], dense
    for trial in sorted(best.values(), key=lambda trial: trial.goodness, reverse=True):
        if chosen is not dense:
            trial = _try({**chosen.choices, **trial.choices}, score)
            trace.append(trial)
        if trial.goodness > chosen.goodness:
            chosen = trial
    return dict(chosen.choices), trace


def _check_candidates(candidates: Sequence[tuple[str, float]]) -> None:
    if not candidates:
        raise ValueError("laser_search: there are no candidates; give pairs of a site and a keep_rank")
    for position, pair in enumerate(candidates):
        if pair in candidates[:position]:
            raise ValueError(f"laser_search: the candidate {pair} stands there twice; each is scored once")


def _try(choices: Mapping[str, float], score: Score) -> Trial:
    accuracy, log_loss = score(choices)
    if not (isfinite(accuracy) and isfinite(log_loss)):
        raise ValueError(
            f"laser_search: the score of {choices or 'the dense model'} must be two finite numbers, "
            f"accuracy and log-loss, got {accuracy}, {log_loss}"
        )
    return Trial(choices, accuracy, log_loss)
