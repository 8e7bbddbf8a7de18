"""Finding the boundary with few checkpoints: O(log L) of them instead of one per depth."""

from __future__ import annotations

from collections.abc import Callable

from tensormix.diagnose.boundary import Boundary, Measurement, find_boundary, left


def bisect_boundary(
    measure: Callable[[int], Measurement],
    num_blocks: int,
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Boundary:
    """The boundary of a model of `num_blocks` blocks, from calls of measure(depth) with depth 0..num_blocks.

    Measures the dense model and the deepest checkpoint, halves the span between good and bad at the middle of their
    accuracies (far from the noise of either); where that depth has left the plateau already, as in a gradual fall, it
    halves the span before it too. That is about log2(L) + 3 calls for an abrupt transition and at most twice that for a
    gradual one, no depth twice. Accuracy is taken to fall with depth up to noise: a dip that comes back, which a full
    scan would dismiss, can mislead it.

    Raises ValueError for num_blocks < 1.
    """
    if num_blocks < 1:
        raise ValueError(f"bisection: num_blocks must be at least 1, got {num_blocks}")
    seen = {depth: measure(depth) for depth in (0, num_blocks)}

    def at(depth: int) -> Measurement:
        if depth not in seen:
            seen[depth] = measure(depth)
        return seen[depth]

    if left(seen[num_blocks], [seen[0]]):
        middle = (seen[0].accuracy + seen[num_blocks].accuracy) / 2
        good, bad = 0, num_blocks
        while bad - good > 1:
            half = (good + bad) // 2
            good, bad = (half, bad) if at(half).accuracy > middle else (good, half)
        at(good // 2)  # the plateau from the dense model alone would be as uncertain as one measurement
        _find_onset(at, good)
    return find_boundary(list(seen.values()), confidence=confidence, num_resamples=num_resamples, seed=seed)


def _find_onset(at: Callable[[int], Measurement], deepest: int) -> None:
    """Halves once more where `deepest` has left the plateau: the middle of a gradual fall lies beyond its onset."""
    plateau = [at(0)]
    good, bad = 0, deepest
    if deepest and left(at(deepest), plateau):
        while bad - good > 1:
            half = (good + bad) // 2
            if left(at(half), plateau):
                bad = half
            else:
                good = half
                plateau.append(at(half))
