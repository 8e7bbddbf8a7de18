"""The heads of attention: where their channels lie, fused or not, and in which order they come.

Shape letters: I in_features, O out_features, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensormix.reparameterise.layers import groups, set_values
from tensormix.reparameterise.neurons import alike_order
from tensormix.sites import Site, head_counts, takes_turns


@dataclass(frozen=True)
class Projection:
    """q, k or v: all rows of its layer, or those of a layer that multiplies several of them at once."""

    site: Site
    rows: Tensor  # (O,)

    @property
    def weight(self) -> Tensor:  # (O, I), in fp64
        return self.site.weight[self.rows].double()

    def turn(self, turns: list[Tensor]) -> None:  # (D, D) of each head
        """Head h becomes turns[h] times what it was."""
        self._set(torch.block_diag(*turns))

    def reorder(self, order: Tensor) -> None:  # (O,)
        self.site.weight[self.rows] = self.site.weight[self.rows[order]]
        if self.site.bias is not None:
            self.site.bias[self.rows] = self.site.bias[self.rows[order]]

    def _set(self, turn: Tensor) -> None:  # (O, O)
        self.site.weight[self.rows] = (turn @ self.weight).to(self.site.weight)
        if self.site.bias is not None:
            self.site.bias[self.rows] = (turn @ self.site.bias[self.rows].double()).to(self.site.bias)


@dataclass(frozen=True)
class Attention:
    """The dense projections of one attention: query heads of a group lie side by side and read one key-value head."""

    q: Projection
    k: Projection
    v: Projection
    out: Site
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def names(self) -> dict[str, str]:
        """The site of each of q, k, v and o."""
        return {"q": self.q.site.name, "k": self.k.site.name, "v": self.v.site.name, "o": self.out.name}

    @property
    def group(self) -> int:
        """How many query heads read one key-value head."""
        return self.num_heads // self.num_kv_heads

    def per_query_head(self, of_kv_heads: list[Tensor]) -> list[Tensor]:
        """What belongs to each key-value head, once for each query head that reads it."""
        return [one for one in of_kv_heads for _ in range(self.group)]


def attentions(model: nn.Module) -> Iterator[Attention]:
    """Every attention of the model whose q, k, v and o are dense layers with these roles.

    Raises ValueError if the heads are not known or do not fit the shapes.
    """
    for sites in groups(model, {"q", "k", "v", "qkv", "o"}):
        if "o" not in sites or not ("qkv" in sites or {"q", "k", "v"} <= set(sites)):
            continue
        counts = head_counts(model)
        if counts is None:
            raise ValueError(f"{sites['o'].name}: the config of the model does not say how many heads it has")
        H, G, D = counts
        sizes = {"q": H * D, "k": G * D, "v": G * D}
        expected = {"qkv": sum(sizes.values())} if "qkv" in sites else sizes
        fits = all(sites[role].out_features == size for role, size in expected.items())
        if not fits or sites["o"].in_features != H * D:
            raise ValueError(
                f"{sites['o'].name}: the layers of this attention do not have {H} heads ({G} of keys and values) of "
                f"{D} channels, as the config says"
            )
        rows = (
            _fused_rows(model, sites["qkv"], sizes, G) if "qkv" in sites else {r: torch.arange(sizes[r]) for r in sizes}
        )
        parts = {role: Projection(sites.get("qkv") or sites[role], index) for role, index in rows.items()}
        yield Attention(parts["q"], parts["k"], parts["v"], sites["o"], H, G, D)


@torch.no_grad()
def permute_heads(model: nn.Module) -> list[str]:
    """Order the key-value heads, and the query heads that read each of them, so that neighbours are alike, in place.

    Placed as `sort_neurons` does, by all weights of a group, then by those of a query head. The model computes the
    same. Returns the names of the rewritten sites.
    """
    done: dict[str, None] = {}
    for attention in attentions(model):
        D = attention.head_dim
        queries = _features(attention.q, D, attention.out)  # (H, .)
        shared = torch.cat([_features(attention.k, D), _features(attention.v, D)], 1)  # (G, .)
        of_group = queries.unflatten(0, (attention.num_kv_heads, attention.group))
        order = alike_order(torch.cat([of_group.mean(1), shared], 1))  # of key-value heads
        heads = torch.cat([g * attention.group + alike_order(of_group[g]) for g in order.tolist()])
        channels, shared_channels = (_channels(one, D) for one in (heads, order))
        attention.q.reorder(channels)
        attention.k.reorder(shared_channels)
        attention.v.reorder(shared_channels)
        set_values(attention.out, attention.out.weight[:, channels], None)
        done |= dict.fromkeys(attention.names.values())
    return list(done)


def _fused_rows(model: nn.Module, site: Site, sizes: dict[str, int], num_kv_heads: int) -> dict[str, Tensor]:
    """The rows of each part, which take turns in some architectures."""
    turns = num_kv_heads if takes_turns(model, site) else 1
    rows = torch.arange(site.out_features).unflatten(0, (turns, -1))
    pieces = rows.split([size // turns for size in sizes.values()], dim=1)
    return {role: piece.flatten() for role, piece in zip(sizes, pieces, strict=True)}


def _features(projection: Projection, D: int, out: Site | None = None) -> Tensor:  # (heads, .)
    """One row for each head: its weights, each kind of them at length one."""
    parts = [projection.weight] if out is None else [projection.weight, out.weight.T.double()]
    rows = [part.unflatten(0, (-1, D)).flatten(1) for part in parts]
    return torch.cat([row / row.norm(dim=1, keepdim=True).clamp_min(1e-30) for row in rows], 1)


def _channels(heads: Tensor, D: int) -> Tensor:  # (N,) -> (N D,)
    return (heads[:, None] * D + torch.arange(D, device=heads.device)).flatten()
