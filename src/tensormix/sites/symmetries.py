"""What may be changed in several layers of a block at once without anybody noticing, proved by numbers on the twin.

Values of heads in another basis pass from v to o if attention only mixes tokens; neurons in another order pass from
gate and up to down if what lies between treats them alike; queries and keys may turn together, pair by pair.

Shape letters: H query heads, G heads of keys and values, C channels of a head, O outputs of a layer, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tensormix.sites.trials import Change, Finding, tried


class Rows(NamedTuple):
    """The part of a layer's outputs that has a role, in order."""

    name: str
    rows: Tensor  # (O,)


def values_pass(
    model: nn.Module, block: int, v: Rows, o: str, counts: tuple[int, int, int], *, orthogonal: bool
) -> Finding | None:
    """None if the values of each head of keys and values may be in another basis, which o undoes; else why not.

    Args:
        v, o: the names of the sites.
        counts: H, G and C, as the rows of v and the columns of o are divided.
        orthogonal: whether bases are only turned; any invertible map otherwise.
    """
    H, G, C = counts
    generator = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(G, C, C, generator=generator)).Q
    scales = torch.ones(G, 1, C) if orthogonal else 1 + 2 * torch.rand(G, 1, C, generator=generator)
    maps, back = turns * scales, (turns / scales).mT.repeat_interleave(H // G, dim=0)  # (G, C, C), (H, C, C)

    def turned(out: Tensor) -> Tensor:  # (..., O)
        parts = out[..., v.rows].unflatten(-1, (G, C))
        changed = out.clone()
        changed[..., v.rows] = torch.einsum("...gc,gdc->...gd", parts, maps).flatten(-2)
        return changed

    def undone(x: Tensor) -> Tensor:  # (..., H C)
        return torch.einsum("...hc,hdc->...hd", x.unflatten(-1, (H, C)), back).flatten(-2)

    key = ("values", v.name, tuple(v.rows.tolist()), o, counts, orthogonal)
    return tried(model, block, key, {v.name: turned}, {o: undone})


def neurons_pass(model: nn.Module, block: int, into: list[Rows], down: str) -> Finding | None:
    """None if the neurons may come in another order, in these rows and in the columns of down; else why not."""
    count = len(into[0].rows)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).roll(1)
    rows: dict[str, Tensor] = {}
    for part in into:
        rows[part.name] = torch.cat([rows.get(part.name, part.rows[:0]), part.rows])

    def moved(name: str) -> Change:
        places = rows[name].unflatten(0, (-1, count))

        def change(out: Tensor) -> Tensor:  # (..., O)
            changed = out.clone()
            changed[..., places.flatten()] = out[..., places[:, order].flatten()]
            return changed

        return change

    inverse = order.argsort()
    key = ("neurons", *((name, tuple(places.tolist())) for name, places in rows.items()), down)
    return tried(model, block, key, {name: moved(name) for name in rows}, {down: lambda x: x[..., inverse]})


def pairs_pass(
    model: nn.Module, block: int, q: Rows, k: Rows, counts: tuple[int, int, int], pairs: Tensor
) -> Finding | None:  # (P, 2)
    """None if queries and keys of each head may be turned and scaled pair by pair, the other channels mapped; else why.

    Args:
        pairs: the channels of a head that rotary positions turn together.
    """
    H, G, C = counts
    generator = torch.Generator().manual_seed(0)
    free = [c for c in range(C) if c not in set(pairs.flatten().tolist())]
    maps, back = torch.zeros(2, G, C, C)  # and their inverses, transposed
    for head, inverse in zip(maps, back, strict=True):
        for first, second in pairs.tolist():
            a, b = 0.5 + torch.rand(2, generator=generator)
            both = torch.tensor([first, second])
            head[both[:, None], both] = turn = torch.stack([a, -b, b, a]).view(2, 2)
            inverse[both[:, None], both] = turn / (a * a + b * b)
        if free:
            inner = torch.linalg.qr(torch.randn(len(free), len(free), generator=generator)).Q
            scales = 1 + torch.rand(len(free), generator=generator)
            head[torch.tensor(free)[:, None], free] = inner * scales
            inverse[torch.tensor(free)[:, None], free] = inner / scales
    of_queries, of_keys = maps.repeat_interleave(H // G, dim=0), back

    def mapped(rows: Tensor, by: Tensor) -> Change:
        def change(out: Tensor) -> Tensor:  # (..., O)
            changed = out.clone()
            parts = out[..., rows].unflatten(-1, (len(by), C))
            changed[..., rows] = torch.einsum("...hc,hdc->...hd", parts, by).flatten(-2)
            return changed

        return change

    first, second = mapped(q.rows, of_queries), mapped(k.rows, of_keys)
    key = ("pairs", q.name, tuple(q.rows.tolist()), k.name, tuple(k.rows.tolist()), counts, str(pairs.tolist()))
    if q.name == k.name:
        return tried(model, block, key, {q.name: lambda out: second(first(out))}, {})
    return tried(model, block, key, {q.name: first, k.name: second}, {})
