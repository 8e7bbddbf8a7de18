"""Numerics that methods share: factorisations, sparse steps, conjugate gradients, ranks, a budget divided."""
