"""Inputs and weights that sparse plus low rank is fitted to."""

from __future__ import annotations

import torch

from tensormix.statistics import Gram

SOLVERS = ("alps", "sparsegpt")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(x):
    gram = Gram(x.shape[1])
    gram.update(x)
    return gram


def correlated(num_tokens, in_features, seed=1):
    spectrum = torch.logspace(0, -2, in_features)[:, None]
    return random(num_tokens, in_features, seed=seed) @ (spectrum * random(in_features, in_features, seed=seed + 1))


def planted(out_features, in_features, rank, num_values):
    """A matrix of this rank, plus entries at random places that all stand out from it."""
    low = random(out_features, rank, seed=1) @ random(rank, in_features, seed=2) / rank**0.5
    entries = random(out_features * in_features, seed=3)
    places = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(4))[:num_values]
    sparse = torch.zeros(out_features * in_features)
    sparse[places] = 3 * (entries.sign() + entries)[places]
    return low + sparse.view(out_features, in_features)
