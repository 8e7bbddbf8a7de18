"""Random weights of any size, in little memory."""

from __future__ import annotations

import torch

from tensormix.sites.twin import random_like


def test_the_matrices_of_a_large_stack_differ_and_lie_dense_in_the_memory_of_about_one():
    stack = random_like("experts", torch.Size((12, 80, 96)), torch.float32)
    assert stack.shape == (12, 80, 96) and stack.isfinite().all()
    assert all(matrix.is_contiguous() for matrix in stack)
    assert stack.untyped_storage().nbytes() < 1.1 * stack[0].nbytes
    assert len({float(matrix[3, 5]) for matrix in stack}) == len(stack)
    assert torch.linalg.matrix_rank(stack[-1]) == 80
    small = random_like("experts", torch.Size((3, 4, 5)), torch.float32)
    assert small.is_contiguous() and torch.equal(small, random_like("experts", small.shape, torch.float32))


def test_a_stack_that_is_all_matrices_and_no_columns():
    assert random_like("conv", torch.Size((70000, 1, 1)), torch.float32).shape == (70000, 1, 1)
