"""The channels of queries and keys in other bases that leave every score as it is.

Shape letters: I in_features, H heads, G key-value heads, D head size, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tensormix.reparameterise.heads import Attention, attentions
from tensormix.reparameterise.values import balance, gram_of
from tensormix.sites import locate_blocks
from tensormix.sites.families import FAMILIES, family_of, norm_of_heads, rotary_channels
from tensormix.sites.symmetries import Rows, pairs_pass


@torch.no_grad()
def rotate_pairs(model: nn.Module, grams: Mapping[str, Tensor]) -> list[str]:
    """Align and balance queries and keys, in place: q becomes M q and k becomes M^-T k, so that q . k stays.

    Rotary positions turn pairs of channels, so there M must commute with rotations: one complex number for each pair
    and key-value head, shared by the query heads that read it. Its angle turns the first channel of the pair onto the
    principal axis of queries and keys together, its size gives both the same energy. Channels without rotary
    positions (all of them in OPT and GPT-2) get any invertible M: the balanced one, see `balance_values`.

    Args:
        grams: Gram matrices (I, I) of the inputs of the q sites (fused ones too), by name.

    Returns:
        The names of the rewritten sites.

    Raises:
        ValueError: queries or keys go through a norm first, how this architecture pairs channels is not known, or a q
            site has no Gram matrix. Nothing was changed then.
    """
    pairs = _pairs(model)
    found = list(attentions(model))
    for attention in found:
        _check(model, attention, pairs)
    chosen = [(attention, _maps(attention, pairs, grams)) for attention in found]
    done: dict[str, None] = {}
    for attention, maps in chosen:
        attention.q.turn(attention.per_query_head(maps))
        attention.k.turn([torch.linalg.inv(one).T for one in maps])
        done |= dict.fromkeys((attention.names["q"], attention.names["k"]))
    return list(done)


def _pairs(model: nn.Module) -> Tensor:  # (P, 2), channels of a head
    """Raises ValueError where queries and keys cannot be turned."""
    root, layers = locate_blocks(model)
    block = layers[0]
    kind, pairs = type(block).__name__, family_of(block).pairs
    if (norm := norm_of_heads(block)) is not None:
        raise ValueError(
            f"{root}.0.{norm} stands between a projection and its rotary positions and weights every channel by "
            f"itself: pairs of queries and keys cannot be turned in a {kind} without changing the model"
        )
    if pairs is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.pairs is not None)
        raise ValueError(f"{root}.0 is a {kind}: how it pairs channels for its positions is not known; known: {known}")
    return rotary_channels(model, pairs)


def _check(model: nn.Module, attention: Attention, pairs: Tensor) -> None:  # (P, 2)
    q, k = (Rows(part.site.name, part.rows) for part in (attention.q, attention.k))
    counts = attention.num_heads, attention.num_kv_heads, attention.head_dim
    found = pairs_pass(model, attention.out.block or 0, q, k, counts, pairs)
    if found is not None:
        raise ValueError(
            f"{q.name}, {k.name}: pairs of queries and keys cannot be turned without changing the model: "
            f"{found.reason()}; nothing was changed"
        )


def _maps(attention: Attention, pairs: Tensor, grams: Mapping[str, Tensor]) -> list[Tensor]:  # (D, D) of each kv head
    gram, D = gram_of(grams, attention.names["q"], "rotate_pairs"), attention.head_dim
    queries, keys = (_moments(one.weight, gram, D) for one in (attention.q, attention.k))
    queries = queries.unflatten(0, (attention.num_kv_heads, attention.group)).mean(1)
    return [_map(q, k, pairs) for q, k in zip(queries, keys, strict=True)]


def _moments(weight: Tensor, gram: Tensor, D: int) -> Tensor:  # (heads D, I), (I, I) -> (heads, D, D)
    heads = weight.unflatten(0, (-1, D))
    return heads @ gram @ heads.mT


def _map(queries: Tensor, keys: Tensor, pairs: Tensor) -> Tensor:  # (D, D), (D, D) -> (D, D)
    turn = torch.zeros_like(queries)
    for first, second in pairs.tolist():
        both = [first, second]
        turn[first, both], turn[second, both] = _complex(queries[both][:, both], keys[both][:, both])
    free = [c for c in range(len(queries)) if c not in set(pairs.flatten().tolist())]
    if free:
        rows = torch.tensor(free)[:, None]
        turn[rows, free] = balance(queries[rows, free], keys[rows, free])[0]
    return turn


def _complex(queries: Tensor, keys: Tensor) -> Tensor:  # (2, 2), (2, 2) -> (2, 2)
    """size * rotation: equal energies afterwards, and the principal axis of both together first."""
    energies = [float(moment.trace()) for moment in (queries, keys)]
    if min(energies) <= 0:
        return torch.eye(2).to(queries)
    size = (energies[1] / energies[0]) ** 0.25
    together = queries / energies[0] + keys / energies[1]
    angle = torch.atan2(2 * together[0, 1], together[0, 0] - together[1, 1]) / 2
    cos, sin = angle.cos(), angle.sin()
    return size * torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])
