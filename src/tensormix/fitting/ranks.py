"""How many numbers two thin factors hold.

Shape letters: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from math import ceil, floor


def rank_for(method: str, keep: float, in_features: int, out_features: int) -> int:
    """The largest rank whose two factors hold at most `keep` of the dense parameters: floor(keep O I / (O + I)).

    Raises:
        ValueError: not even rank 1 fits; the sentence begins with `method`.
    """
    per_rank = (in_features + out_features) / (in_features * out_features)
    rank = floor(keep / per_rank + 1e-9)  # the margin undoes the rounding of keep
    if rank >= 1:
        return rank
    if per_rank > 1:
        raise ValueError(f"{method}: {no_factors(in_features, out_features)}")
    smallest = ceil(per_rank * 1e4) / 1e4
    raise ValueError(
        f"{method}: keep={keep} leaves no rank for a {in_features}x{out_features} layer; "
        f"the smallest usable keep is {smallest:.4f}."
    )


def keeps(in_features: int, out_features: int) -> tuple[float, ...]:
    """For every rank whose factors hold no more than the dense weight the least `keep` that gives it, to six digits."""
    dense, per_rank = in_features * out_features, in_features + out_features
    return tuple(min(1.0, ceil(rank * per_rank / dense * 1e6) / 1e6) for rank in range(1, dense // per_rank + 1))


def no_factors(in_features: int, out_features: int) -> str:
    """The end of the sentence for a layer that is too small for any rank."""
    return (
        f"rank 1 of a {in_features}x{out_features} layer stores {in_features + out_features} numbers, "
        f"the dense weight {in_features * out_features}; leave this layer dense."
    )
