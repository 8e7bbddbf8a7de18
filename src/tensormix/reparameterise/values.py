"""The channels of the values of each head in other bases, which the output projection undoes.

Shape letters: I in_features, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tensormix.reparameterise.heads import Attention, attentions
from tensormix.reparameterise.layers import set_values
from tensormix.sites.symmetries import Rows, values_pass

# Of the largest eigenvalue: what is smaller counts as this much, so that no map has a condition above 1e3.
FLOOR = 1e-6
Maps = list[tuple[Tensor, Tensor]]  # (D, D), (D, D) of each key-value head: M and its inverse


@torch.no_grad()
def align_heads(model: nn.Module, grams: Mapping[str, Tensor]) -> list[str]:
    """Turn the values of every key-value head into the basis of their principal components, in place.

    With an orthogonal M for each key-value head, v becomes M v, and o takes M^T at every query head that reads it: the
    model computes the same.

    Args:
        grams: Gram matrices (I, I) of the inputs of the v sites (fused ones too), by name.

    Returns:
        The names of the rewritten sites.

    Raises:
        ValueError: a v site has no Gram matrix, or what lies between v and o does not let another basis pass.
    """

    def principal(attention: Attention) -> Maps:
        gram = gram_of(grams, attention.names["v"], "align_heads")
        heads = attention.v.weight.split(attention.head_dim)
        turns = [torch.linalg.eigh(rows @ gram @ rows.T).eigenvectors.flip(1).T for rows in heads]
        return [(turn, turn.T) for turn in turns]

    return map_values(model, principal, orthogonal=True)


@torch.no_grad()
def whiten_values(model: nn.Module, grams: Mapping[str, Tensor]) -> list[str]:
    """Let what each key-value head hands to o be white, in place: v becomes M v, and o takes M^-1.

    M is any invertible map: a head's values are mixed by attention alike, so M passes through. The moments are the
    mean over the query heads that read a key-value head; directions without energy (`FLOOR`) are not blown up.

    Args:
        grams: Gram matrices (H D, H D) of the inputs of the o sites, by name.

    Raises:
        ValueError: an o site has no Gram matrix, or one that is zero or not finite, or what lies between v and o does
            not let another basis pass.
    """

    def white(attention: Attention) -> Maps:
        return [_whitening(moment) for moment in _moments(attention, grams, "whiten_values")]

    return map_values(model, white)


@torch.no_grad()
def balance_values(model: nn.Module, grams: Mapping[str, Tensor]) -> list[str]:
    """Give each channel of the values as much weight in o as it has energy, the strongest first, in place.

    The balanced realisation of control theory (Moore 1981): with P the moments of what a key-value head hands to o and
    Q the sum of W^T W over the columns of o that read it, M P M^T = M^-T Q M^-1, and both are diagonal.

    Args, raises: as `whiten_values`.
    """

    def balanced(attention: Attention) -> Maps:
        columns = attention.out.weight.double().T.split(attention.head_dim)  # (D, O) of each query head
        reads = _sums(attention, [part @ part.T for part in columns])
        moments = _moments(attention, grams, "balance_values")
        return [balance(moment, weight) for moment, weight in zip(moments, reads, strict=True)]

    return map_values(model, balanced)


@torch.no_grad()
def map_values(
    model: nn.Module, maps: Callable[[Attention], Maps], *, orthogonal: bool = False
) -> list[str]:  # fmt: skip
    """Let v be M v and o take M^-1, in place, with the pairs (M, M^-1) that `maps` gives for each key-value head.

    The model computes the same. All maps are asked for before any layer changes. Returns the names of the rewritten
    sites.

    Raises ValueError if what lies between v and o does not let such a map, or only an `orthogonal` one, pass.
    """
    found = list(attentions(model))
    for attention in found:
        check_values(model, attention, orthogonal)
    chosen = [(attention, maps(attention)) for attention in found]
    done: dict[str, None] = {}
    for attention, of_heads in chosen:
        attention.v.turn([into for into, _ in of_heads])
        back = torch.block_diag(*attention.per_query_head([back for _, back in of_heads]))
        set_values(attention.out, attention.out.weight.double() @ back, None)
        done |= dict.fromkeys((attention.names["v"], attention.names["o"]))
    return list(done)


def check_values(model: nn.Module, attention: Attention, orthogonal: bool) -> None:
    v, out = attention.v, attention.out
    counts = attention.num_heads, attention.num_kv_heads, attention.head_dim
    found = values_pass(
        model, out.block or 0, Rows(v.site.name, v.rows), out.name, counts, orthogonal=orthogonal
    )  # fmt: skip
    if found is not None:
        raise ValueError(
            f"{v.site.name}, {out.name}: the values of its heads cannot be put into another basis without changing the "
            f"model: {found.reason()}; nothing was changed"
        )


def balance(moment: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # (D, D), (D, D) -> (D, D), (D, D)
    """M and M^-1 for which M moment M^T = M^-T weight M^-1 is diagonal, the largest first; both are floored."""
    into, back = _whitening(moment)  # moment = back back^T
    values, vectors = _floored(back.T @ weight @ back)
    scale = values.flip(0) ** 0.25
    turned = vectors.flip(1)
    return scale[:, None] * turned.T @ into, back @ turned / scale


def gram_of(grams: Mapping[str, Tensor], name: str, asker: str) -> Tensor:
    """In fp64. Raises ValueError if there is none for `name`, or it is zero or not finite."""
    if name not in grams:
        raise ValueError(f"{name}: {asker} needs the Gram matrix of its inputs, and none was given")
    gram = grams[name].double()
    if not float(gram.diagonal().sum()) > 0 or not bool(gram.isfinite().all()):
        raise ValueError(f"{name}: the inputs that {asker} was given are all zero or not finite")
    return gram


def _moments(attention: Attention, grams: Mapping[str, Tensor], asker: str) -> list[Tensor]:  # (D, D) of each kv head
    gram, D = gram_of(grams, attention.names["o"], asker), attention.head_dim
    of_heads = [gram[start : start + D, start : start + D] for start in range(0, len(gram), D)]
    return [total / attention.group for total in _sums(attention, of_heads)]


def _sums(attention: Attention, of_heads: list[Tensor]) -> Iterator[Tensor]:
    """Of each key-value head, over the query heads that read it."""
    for start in range(0, attention.num_heads, attention.group):
        yield torch.stack(of_heads[start : start + attention.group]).sum(0)


def _whitening(moment: Tensor) -> tuple[Tensor, Tensor]:  # (D, D) -> (D, D), (D, D)
    """M with M moment M^T = 1, the strongest direction first, and M^-1."""
    values, vectors = _floored(moment)
    root, turned = values.flip(0).sqrt(), vectors.flip(1)
    return turned.T / root[:, None], turned * root


def _floored(moment: Tensor) -> tuple[Tensor, Tensor]:  # (D, D) -> (D,), (D, D)
    values, vectors = torch.linalg.eigh(moment)
    largest = float(values[-1])
    if largest <= 0:  # a head without any energy stays as it is
        return torch.ones_like(values), torch.eye(len(values)).to(values)
    return values.clamp_min(FLOOR * largest), vectors
