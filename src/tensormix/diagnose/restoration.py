"""Which entries of a weight a truncated SVD gives back, and at which rank (arXiv 2606.03465, Fig. 6 and 9).

Legend: O out_features, I in_features, R largest rank, M tracked entries.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tensormix.diagnose.base import Batches, Diagnostic, Row, run_hooked
from tensormix.diagnose.super_weights import SuperWeights
from tensormix.operators.base import computing_dtype
from tensormix.sites import Site, find_sites

OUTLIER = 3.0  # times the root mean square of the weight; what lies above is no inlier


class Restoration(Diagnostic):
    """Fraction of tracked entries of one weight that a truncated SVD restores, against its rank.

    An entry counts as restored at rank r if, at r and at every larger rank, it is within `tolerance` of its value, in
    units of the larger of its own size and the weight's root mean square. Tracked are random inliers, the entries of
    largest magnitude, those with the largest |W_ij| * sqrt(mean x_j^2), and the super weights of the site.

    Rows of kind "restoration" (set, rank, value) and "tracked_entry" (set, row, column, value).
    Raises ValueError without batches, and for a site that the model does not have.
    """

    looks_at: ClassVar[Literal["dense", "pair"]] = "dense"
    name: Literal["restoration"] = "restoration"
    site: str | None = (
        None  # name of a linear layer; without it that of a super weight, else the second down projection
    )
    num_entries: int = Field(default=64, ge=1)  # of each set
    tolerance: float = Field(default=0.1, gt=0)
    num_ranks: int = Field(default=32, ge=2)  # evenly spaced, up to the full rank
    seed: int = Field(default=0, ge=0)  # of the inliers

    def measure(self, model: nn.Module, batches: Batches) -> list[Row]:
        found = [row for row in SuperWeights()(model, batches) if row["kind"] == "super_weight"]
        known = [row for row in found if row["expert"] is None]  # those of linear layers
        site = self._site(model, known)
        sets = self._sets(model, site, batches, known)
        return [row for name, places in sets.items() if len(places) for row in self._rows(site, name, places)]

    def _sets(self, model: nn.Module, site: Site, batches: Batches, known: list[Row]) -> dict[str, Tensor]:  # (M, 2)
        weight = site.weight
        return {
            "inlier": inliers(weight, self.num_entries, self.seed),
            "top_magnitude": largest(weight.abs(), self.num_entries),
            "activation_weighted": largest(
                weight.abs() * input_sizes(model, site, batches).to(weight), self.num_entries
            ),
            "super_weight": torch.tensor(
                [(row["row"], row["column"]) for row in known if row["site"] == site.name], dtype=torch.long
            ).reshape(-1, 2),
        }

    def _rows(self, site: Site, name: str, places: Tensor) -> list[Row]:  # (M, 2)
        weight, rank = site.weight, min(site.weight.shape)
        ranks = sorted({round(1 + i * (rank - 1) / (self.num_ranks - 1)) for i in range(self.num_ranks)})
        labels = {"site": site.name, "block": site.block, "set": name}
        needed_rank = restoring_ranks(weight, places, self.tolerance)
        entries = [
            {"kind": "tracked_entry", **labels, "row": row, "column": col, "value": float(weight[row, col]), "rank": at}
            for (row, col), at in zip(places.tolist(), needed_rank.tolist(), strict=True)
        ]
        curve = [
            {
                "kind": "restoration",
                **labels,
                "rank": at,
                "value": float((needed_rank <= at).double().mean()),
                "num_entries": len(places),
                "tolerance": self.tolerance,
            }
            for at in ranks
        ]
        return [*entries, *curve]

    def _site(self, model: nn.Module, known: list[Row]) -> Site:
        linear = [site for site in find_sites(model) if site.kind == "linear"]
        wanted = self.site or (known[0]["site"] if known else None)
        if wanted is None:
            down = [site for site in linear if site.role == "down"] or linear
            return down[min(1, len(down) - 1)]
        found = [site for site in linear if site.name == wanted]
        if not found:
            examples = ", ".join(site.name for site in linear[:2])
            raise ValueError(f"{self.name}: the model has no dense linear layer {wanted!r}; they look like {examples}")
        return found[0]


def restoring_ranks(weight: Tensor, places: Tensor, tolerance: float) -> Tensor:  # (O, I), (M, 2) -> (M,)
    """The smallest rank from which on the truncated SVD of `weight` holds each entry within the tolerance.

    R + 1 where rounding keeps an entry away from its value even at the full rank.
    """
    wide = weight.to(computing_dtype(weight))
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    rows, columns = places.unbind(1)
    truth = wide[rows, columns].double()
    partial = (u[rows] * s * vh[:, columns].T).double().cumsum(1)  # (M, R): the entry at each rank
    unit = torch.maximum(truth.abs(), wide.double().square().mean().sqrt())
    wrong = (partial - truth[:, None]).abs() > tolerance * unit[:, None]
    places_from_end = wrong.flip(1).int().argmax(1)  # ranks beyond the last wrong one
    last_wrong = torch.where(wrong.any(1), wrong.shape[1] - places_from_end, 0)
    return last_wrong + 1


def inliers(weight: Tensor, num: int, seed: int) -> Tensor:  # (O, I) -> (M, 2)
    """Random places whose entries are at most three times the root mean square; fewer where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    flat = weight.float().abs().flatten().cpu()
    drawn = torch.randint(len(flat), (4 * num,), generator=generator).unique()
    drawn = drawn[torch.randperm(len(drawn), generator=generator)]
    kept = drawn[flat[drawn] <= OUTLIER * flat.square().mean().sqrt()][:num]
    return torch.stack([kept // weight.shape[1], kept % weight.shape[1]], dim=1)


def largest(scores: Tensor, num: int) -> Tensor:  # (O, I) -> (M, 2)
    top = scores.float().flatten().topk(min(num, scores.numel())).indices.cpu()
    return torch.stack([top // scores.shape[1], top % scores.shape[1]], dim=1)


def input_sizes(model: nn.Module, site: Site, batches: Batches) -> Tensor:  # (I,)
    """Root mean square of each input of a linear site over all tokens."""
    total, num_tokens = torch.zeros(site.in_features, dtype=torch.float64), 0

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal num_tokens
        inputs = args[0].flatten(0, -2).double()
        total.add_(inputs.square().sum(0).cpu())
        num_tokens += len(inputs)

    run_hooked(model, batches, [site.module.register_forward_pre_hook(hook)])
    return (total / num_tokens).sqrt()
