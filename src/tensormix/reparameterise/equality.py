"""Whether a rewritten model still computes the same."""

from __future__ import annotations

import torch
from torch import Tensor

# A rewritten weight is rounded once more; logits of a deep model in fp32 move by far less than this.
TOLERANCE = 1e-3


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
