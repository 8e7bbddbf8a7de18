"""The product of a batch of tokens with a tensor mixture, and its gradients.

Shape letters (this folder):
  N tokens     I, O in_features / out_features     I', O' the same, padded     K num_branches
  d bond     L = d^k, R = d^(K-1-k) bonds that branch k = 0..K-1 passes through on the left / right
  P, Q core input / output size: I' = L P R, O' = L Q R     B blocks of M tokens
"""

from __future__ import annotations

from tensormix.kernels.mixt.op import mixt, mixt_cores, mixt_siblings
from tensormix.kernels.mixt.siblings import part_of_cores, stack_cores

__all__ = ["mixt", "mixt_cores", "mixt_siblings", "part_of_cores", "stack_cores"]
