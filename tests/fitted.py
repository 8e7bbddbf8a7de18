"""Weights and inputs that methods are fitted to, what a statistic sees of the inputs, and what operators make of them.

Shape letters: N tokens, O out_features, I in_features.
"""

from __future__ import annotations

import torch

from tensormix.statistics import Gram


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(O=24, I=32, num_tokens=100, smallest=1e-2, seed=0):
    """A weight (O, I), and inputs (N, I) whose spectrum falls to `smallest` in no particular basis; fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    scales = torch.logspace(0, torch.tensor(smallest).log10().item(), I, dtype=torch.float64)
    return draw(O, I), draw(num_tokens, I) * scales @ torch.linalg.qr(draw(I, I)).Q


def seen(kind, x, dtype=torch.float64):  # (N, I)
    statistic = kind(x.shape[1], dtype=dtype)
    for batch in x.split(7):
        statistic.update(batch)
    return {kind: statistic}


def gram(tokens):  # (N, I)
    statistic = Gram(tokens.shape[1])
    statistic.update(tokens)
    return {Gram: statistic}


def tail(matrix, rank):
    return torch.linalg.svdvals(matrix)[rank:].norm()


def applied(op, x):
    return x @ op.to_dense().T + (0 if op.bias is None else op.bias)
