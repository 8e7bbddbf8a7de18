"""Other weights for the same function: a model rewritten so that its layers are easier to compress.

Shape letters: I in_features, O out_features, F neurons of an MLP, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.sites import Site, find_sites

# A rewritten weight is rounded once more; logits of a deep model in fp32 move by far less than this.
TOLERANCE = 1e-3


@torch.no_grad()
def sort_neurons(model: nn.Module) -> list[str]:
    """Order the neurons of every MLP so that neighbours are alike, in place; the model computes the same.

    Neurons are placed by the leading left singular vector of their weights (incoming and outgoing, every row scaled to
    length one). Returns the names of the rewritten sites; MLPs whose layers have no known role, experts included, stay.
    """
    done = []
    for sites in _groups(model, {"gate", "up", "gate_up", "down"}):
        into = [sites[role] for role in ("gate", "up", "gate_up") if role in sites]
        if "down" not in sites or not into:
            continue
        out, F = sites["down"], sites["down"].in_features
        rows = [part for site in into for part in site.weight.split(F)] + [out.weight.T]
        features = torch.cat([row.double() for row in rows], dim=1)
        features = features / features.norm(dim=1, keepdim=True).clamp_min(1e-30)
        leading = torch.linalg.svd(features - features.mean(0), full_matrices=False).U[:, 0]
        order = leading.argsort(stable=True)
        for site in into:
            whole = torch.cat([order + F * part for part in range(site.out_features // F)])
            _set(site, site.weight[whole], None if site.bias is None else site.bias[whole])
        _set(out, out.weight[:, order], None)
        done += [site.name for site in (*into, out)]
    return done


@torch.no_grad()
def align_heads(model: nn.Module, grams: Mapping[str, Tensor]) -> list[str]:
    """Turn the values of every key-value head into the basis of their principal components, in place.

    With an orthogonal M for each key-value head, v becomes M v, and o takes M^T at every query head that reads it: the
    model computes the same. Layers that multiply q, k and v at once stay as they are.

    Args:
        grams: Gram matrices (I, I) of the inputs of the v sites, by name.

    Returns:
        The names of the rewritten sites.

    Raises:
        ValueError: a v site has no Gram matrix.
    """
    config: Any = getattr(model, "config", None)
    done = []
    for sites in _groups(model, {"q", "v", "o"}):
        if not {"q", "v", "o"} <= set(sites):
            continue
        values, out = sites["v"], sites["o"]
        if values.name not in grams:
            raise ValueError(f"{values.name}: align_heads needs the Gram matrix of its inputs, and none was given")
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        H, G = out.in_features // D, values.out_features // D
        turns = []  # of each key-value head, (D, D)
        for rows in values.weight.double().split(D):
            moment = rows @ grams[values.name].to(rows) @ rows.T
            turns.append(torch.linalg.eigh(moment).eigenvectors.flip(1).T)
        turn = torch.block_diag(*turns)
        bias = None if values.bias is None else (turn @ values.bias.double()).to(values.bias)
        _set(values, (turn @ values.weight.double()).to(values.weight), bias)
        back = torch.block_diag(*[turns[head // (H // G)] for head in range(H)])
        _set(out, (out.weight.double() @ back.T).to(out.weight), None)
        done += [values.name, out.name]
    return done


@torch.no_grad()
def check_equal(before: Tensor, after: Tensor) -> None:
    """Raise ValueError unless two runs gave the same logits within rounding (`TOLERANCE` of their standard deviation).

    An architecture may do something between two layers that this module does not know of, a norm for example.
    """
    moved = float((after.double() - before.double()).abs().max() / before.double().std())
    if not moved <= TOLERANCE:
        raise ValueError(
            f"the rewritten model computes something else: logits moved by {moved:.2g} of their standard deviation, "
            f"allowed is {TOLERANCE}; this architecture cannot be rewritten like that, so load the model anew"
        )


def _groups(model: nn.Module, roles: set[str]) -> Iterator[dict[str, Site]]:
    """The dense linear layers with these roles, by role, for each module that holds some."""
    groups: dict[str, dict[str, Site]] = {}
    for site in find_sites(model):
        if site.kind == "linear" and site.role in roles:
            groups.setdefault(site.name.rpartition(".")[0], {})[site.role] = site
    yield from groups.values()


def _set(site: Site, weight: Tensor, bias: Tensor | None) -> None:  # (O, I), (O,)
    site.weight.copy_(weight.clone())
    if bias is not None and site.bias is not None:
        site.bias.copy_(bias.clone())
