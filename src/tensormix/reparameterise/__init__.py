"""Other weights for the same function: a model rewritten so that its layers are easier to compress."""

from tensormix.reparameterise.equality import TOLERANCE, check_equal
from tensormix.reparameterise.heads import permute_heads
from tensormix.reparameterise.learned import learn_bases, reparameterise
from tensormix.reparameterise.neurons import sort_neurons
from tensormix.reparameterise.pairs import rotate_pairs
from tensormix.reparameterise.residual import residual_basis, rotate_residual
from tensormix.reparameterise.values import align_heads, balance_values, map_values, whiten_values

__all__ = [
    "TOLERANCE",
    "align_heads",
    "balance_values",
    "check_equal",
    "learn_bases",
    "map_values",
    "permute_heads",
    "reparameterise",
    "residual_basis",
    "rotate_pairs",
    "rotate_residual",
    "sort_neurons",
    "whiten_values",
]
