"""The channels of the values in other bases.

Shape letters: I in_features, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.reparameterise.layers import groups, set_values


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
    for sites in groups(model, {"q", "v", "o"}):
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
        set_values(values, (turn @ values.weight.double()).to(values.weight), bias)
        back = torch.block_diag(*[turns[head // (H // G)] for head in range(H)])
        set_values(out, (out.weight.double() @ back.T).to(out.weight), None)
        done += [values.name, out.name]
    return done
