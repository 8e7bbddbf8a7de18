"""Other weights for the same function: a model rewritten so that its layers are easier to compress."""

from tensormix.reparameterise.equality import TOLERANCE, check_equal
from tensormix.reparameterise.heads import align_heads
from tensormix.reparameterise.neurons import sort_neurons
from tensormix.reparameterise.residual import residual_basis, rotate_residual

__all__ = ["TOLERANCE", "align_heads", "check_equal", "residual_basis", "rotate_residual", "sort_neurons"]
