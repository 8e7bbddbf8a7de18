"""The transition boundary of a compression sweep, from accuracies at several depths; no model is involved.

arXiv 2605.25344 (Methods) takes the boundary as "the first onset of an abrupt drop after which performance did not
recover". Made operational: a depth d is a candidate if

1. every scanned depth >= d lies below the plateau, by more than LEFT standard deviations of a new checkpoint. The
   plateau is what lies before d: its mean, and its spread, which is at least the binomial noise of the questions;
2. the mean accuracy from d on lies below the plateau by more than REAL standard errors of that difference.

Among the candidates the boundary is where the change-point fit is best: a constant plateau up to the depth before d,
then a straight fall, then a free level, by least squares weighted with the inverse binomial variances. The fall may
end at d itself (a step), or not before the largest depth (two lines).

The interval comes from resampling: each accuracy is drawn anew from its binomial distribution, plus what the plateau
spreads beyond that, and the whole procedure is repeated.

Legend: R resamples, N scanned depths, C shapes of the fit (start and end of the fall).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEFT = 2.0
REAL = 3.0
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Accuracy of the checkpoint with `depth` compressed blocks (0 is the dense model)."""

    depth: int
    accuracy: float  # fraction of right answers
    num_questions: int


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where accuracy leaves the plateau for good; `value` is None where it does not within the scanned depths.

    The boundary itself lies in last_good + 1 .. value, which is one depth unless those before `value` were not scanned.
    `low` .. `high` is the confidence interval in depths; `high` None means that it is open (too many resamples never
    leave), and both are None where `value` is.
    """

    value: int | None
    last_good: int
    low: int | None
    high: int | None
    confidence: float
    plateau: float  # mean accuracy before the boundary
    plateau_spread: float  # standard deviation of one checkpoint on the plateau
    level: float | None  # mean accuracy from the boundary on
    share_without: float  # fraction of resamples without a boundary
    sentence: str

    def row(self, **labels: Any) -> dict[str, Any]:
        """As a row of kind "boundary"; labels such as method and direction say of which sweep."""
        return {"kind": "boundary", **labels, **self.__dict__}


def find_boundary(
    measurements: Sequence[Measurement], *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Boundary:
    """The boundary of one sweep. The plateau needs a checkpoint before it: give the dense model as depth 0.

    Raises ValueError for fewer than two measurements, a depth given twice, or an accuracy outside 0..1.
    """
    _check(measurements, confidence, num_resamples)
    ordered = sorted(measurements, key=lambda measured: measured.depth)
    depths = np.array([measured.depth for measured in ordered], dtype=float)
    questions = np.array([measured.num_questions for measured in ordered], dtype=float)
    observed = np.array([[measured.accuracy for measured in ordered]])
    place = int(_onsets(depths, observed, questions)[0])
    mean, spread = _plateau(observed, questions)
    plateau, deviation = float(mean[0, place - 1]), float(spread[0, place - 1])
    drawn = _resample(observed[0], questions, plateau, deviation, place, num_resamples, seed)
    found = np.sort(_onsets(depths, drawn, questions))
    share_without = float((found == len(ordered)).mean())
    if place == len(ordered):
        return _without(ordered, plateau, deviation, confidence, share_without)
    tail = (1 - confidence) / 2
    first = min(place, int(found[math.floor(tail * (num_resamples - 1))]))
    last = max(place, int(found[math.ceil((1 - tail) * (num_resamples - 1))]))
    before, here = ordered[place - 1].depth, ordered[place].depth
    level = float(np.average(observed[0, place:], weights=questions[place:]))
    gap = "" if here == before + 1 else f" (depths {before + 1} to {here - 1} were not scanned)"
    return Boundary(
        value=here,
        last_good=before,
        low=ordered[first - 1].depth + 1,
        high=ordered[last].depth if last < len(ordered) else None,
        confidence=confidence,
        plateau=plateau,
        plateau_spread=deviation,
        level=level,
        share_without=share_without,
        sentence=f"accuracy leaves its plateau of {plateau:.3f} at depth {here}{gap} and stays below it: "
        f"{level:.3f} on average from there on",
    )


def left(measured: Measurement, plateau: Sequence[Measurement]) -> bool:
    """Whether a checkpoint lies below the plateau that the other ones form (condition 1 for one depth)."""
    together = [*plateau, measured]
    accuracies = np.array([[each.accuracy for each in together]])
    questions = np.array([float(each.num_questions) for each in together])
    mean, spread = _plateau(accuracies, questions)
    return bool(measured.accuracy < _threshold(mean, spread, questions)[0, -2, -1])


def _plateau(accuracies: Array, questions: Array) -> tuple[Array, Array]:  # (R, N), (N,) -> (R, N), (R, N)
    """Mean and spread of the first 1, 2, ... N checkpoints. The spread is that of one checkpoint of the mean size of
    the set, and at least its binomial noise."""
    weight = np.cumsum(questions)
    count = np.arange(1, len(questions) + 1)
    mean = np.cumsum(accuracies * questions, axis=1) / weight
    second = np.cumsum(accuracies**2 * questions, axis=1) / weight
    sample = np.maximum(second - mean**2, 0) * count / np.maximum(count - 1, 1)
    binomial = _binomial(mean, weight) * count  # the pooled fraction is known with all questions, one checkpoint's not
    return mean, np.sqrt(np.maximum(sample, binomial))


def _binomial(fraction: Array, questions: Array) -> Array:
    """Variance of a measured fraction; two right and two wrong answers are added (Agresti and Coull 1998), as a
    fraction of 0 or 1 is not certain."""
    smooth = (fraction * questions + 2) / (questions + 4)
    return smooth * (1 - smooth) / questions


def _threshold(mean: Array, spread: Array, questions: Array) -> Array:  # -> (R, plateau ends at, checkpoint)
    """What a checkpoint must stay below to have left the plateau that ends at an index."""
    count = np.arange(1, len(questions) + 1)
    size = np.cumsum(questions) / count
    # a checkpoint with fewer questions than the plateau's is noisier by that much; the mean has its own error
    variance = spread[:, :, None] ** 2 * (np.maximum(size[:, None] / questions, 1) + 1 / count[:, None])
    return mean[:, :, None] - LEFT * np.sqrt(variance)


def _onsets(depths: Array, accuracies: Array, questions: Array) -> NDArray[np.int64]:  # (N,), (R, N), (N,) -> (R,)
    """Index of the boundary in each row of accuracies, N where there is none."""
    num = len(depths)
    shapes, starts = _falls(depths)
    allowed = _candidates(accuracies, questions)  # (R, N): whether the boundary may be at this index
    cost = np.where(allowed[:, starts], _residuals(shapes, accuracies, questions), np.inf)
    best = starts[np.argmin(cost, axis=1)]
    return np.where(allowed.any(axis=1), best, num)


def _candidates(accuracies: Array, questions: Array) -> NDArray[np.bool_]:  # (R, N), (N,) -> (R, N)
    """The two conditions at the top of this file, for a boundary at each index 1..N-1."""
    mean, spread = _plateau(accuracies, questions)
    below = accuracies[:, None, :] < _threshold(mean, spread, questions)
    num = len(questions)
    allowed = np.zeros(accuracies.shape, dtype=bool)
    for place in range(1, num):
        weights = questions[place:]
        level = accuracies[:, place:] @ weights / weights.sum()
        error = spread[:, place - 1] * math.sqrt(1 / place + 1 / (num - place))
        stays = below[:, place - 1, place:].all(axis=1)
        allowed[:, place] = stays & (mean[:, place - 1] - level > REAL * error)
    return allowed


def _falls(depths: Array) -> tuple[Array, NDArray[np.int64]]:  # (N,) -> (C, N), (C,)
    """Every shape of the fit as the fraction fallen at each depth, and the index at which its fall is first seen."""
    num = len(depths)
    pairs = [(start, end) for start in range(1, num) for end in range(start, num)]
    begin = np.array([depths[start - 1] if end > start else depths[start] - 1e-9 for start, end in pairs])
    finish = np.array([depths[end] for _, end in pairs])
    fallen = (depths - begin[:, None]) / (finish - begin)[:, None]
    return np.clip(fallen, 0, 1), np.array([start for start, _ in pairs])


def _residuals(shapes: Array, accuracies: Array, questions: Array) -> Array:  # (C, N), (R, N), (N,) -> (R, C)
    """Weighted squared distance of the best plateau * (1 - fallen) + level * fallen, for each shape."""
    weight = 1 / _binomial(accuracies, questions)  # (R, N)
    stay, fall = 1 - shapes, shapes
    aa, ab, bb = weight @ (stay**2).T, weight @ (stay * fall).T, weight @ (fall**2).T
    ya, yb = (weight * accuracies) @ stay.T, (weight * accuracies) @ fall.T
    determinant = aa * bb - ab**2  # positive: each shape has a depth that has not fallen and one that has
    explained = (ya**2 * bb - 2 * ya * yb * ab + yb**2 * aa) / determinant
    return (weight * accuracies**2).sum(axis=1, keepdims=True) - explained


def _resample(
    accuracies: Array, questions: Array, plateau: float, spread: float, place: int, num_resamples: int, seed: int
) -> Array:  # (R, N)
    """Accuracies drawn anew around the measured ones."""
    generator = np.random.default_rng(seed)
    size = questions[:place].mean()
    extra = max(0.0, spread**2 - float(_binomial(np.array(plateau), size)))
    shape = (num_resamples, len(accuracies))
    centre = np.clip(accuracies + math.sqrt(extra) * generator.standard_normal(shape), 0, 1)
    return generator.binomial(questions.astype(int), centre) / questions


def _without(
    ordered: list[Measurement], plateau: float, spread: float, confidence: float, share_without: float
) -> Boundary:
    """The answer where accuracy never leaves the plateau for good; says so, and where it dipped and came back."""
    largest = ordered[-1].depth
    dips = [
        measured.depth
        for place, measured in enumerate(ordered[:-1])
        if place and left(measured, [other for other in ordered if other is not measured])
    ]
    tail = f"; it dips at depth {', '.join(map(str, dips))} but comes back" if dips else ""
    return Boundary(
        value=None,
        last_good=largest,
        low=None,
        high=None,
        confidence=confidence,
        plateau=plateau,
        plateau_spread=spread,
        level=None,
        share_without=share_without,
        sentence=f"accuracy does not leave its plateau of {plateau:.3f} for good up to depth {largest}{tail}",
    )


def _check(measurements: Sequence[Measurement], confidence: float, num_resamples: int) -> None:
    if len(measurements) < 2:
        raise ValueError(
            f"boundary: a plateau and a depth beyond it need at least 2 measurements, got {len(measurements)}; "
            "give the dense model as depth 0 and scan at least one depth"
        )
    depths = [measured.depth for measured in measurements]
    twice = sorted({depth for depth in depths if depths.count(depth) > 1})
    if twice:
        raise ValueError(f"boundary: depth {twice[0]} was given twice; a sweep has one checkpoint per depth")
    for measured in measurements:
        if not 0 <= measured.accuracy <= 1 or measured.num_questions < 1:
            raise ValueError(
                f"boundary: depth {measured.depth} has accuracy {measured.accuracy} on {measured.num_questions} "
                "questions; an accuracy is a fraction 0..1 of at least one question"
            )
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"boundary: confidence must lie between 0 and 1 and num_resamples be at least 1, "
            f"got {confidence} and {num_resamples}"
        )
