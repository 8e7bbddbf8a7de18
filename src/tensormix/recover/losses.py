"""The losses of distillation.

Shape letters: ... positions, V vocabulary, K tokens kept of each position, B windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def top_k_of(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:  # (..., V) -> (..., K), (..., K), (...)
    """What is kept of a teacher's logits: the K most probable tokens, their log-probabilities, the mass of all others.

    The log-probabilities are rounded to fp16 and the tail is what is missing to 1 after that (never below 0), so that
    what is kept is a distribution again.
    """
    values, tokens = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]))
    values = values.half()
    tail = (1 - values.double().exp().sum(-1)).clamp(min=0).float()
    return tokens.int(), values, tail


def top_k_divergence(student: Tensor, tokens: Tensor, log_probabilities: Tensor, tail: Tensor) -> Tensor:
    """KL(teacher || student) in nats over K + 1 events: the kept tokens, and all others together.

    By the log-sum inequality it is at most the divergence over the whole vocabulary, and equal to it if K = V.

    Args:
        student: logits (..., V). tokens: (..., K) integers. log_probabilities: (..., K) of the teacher.
        tail: (...) the teacher's probability of everything else.

    Returns:
        (...) one number for each position.
    """
    student, tokens = student.float(), tokens.long()
    total = student.logsumexp(-1)
    kept = log_probabilities.float()
    divergence = (kept.exp() * (kept - student.gather(-1, tokens) + total[..., None])).sum(-1)
    if tokens.shape[-1] == student.shape[-1]:
        return divergence  # there are no others, and the logarithm of their mass has no gradient
    others = student.scatter(-1, tokens, float("-inf")).logsumexp(-1) - total
    return divergence + torch.special.xlogy(tail, tail) - tail * others


def counted(labels: Tensor, ignored: int) -> Tensor:  # (B, T) -> (B, T - 1)
    """The positions whose next token the language-model loss counts, too."""
    return labels[:, 1:] != ignored


def relative_distance(states: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:  # (B, T, D) each
    """Mean over layers of ||state - target||^2 / ||target||^2, over all positions of a batch."""
    parts = [
        F.mse_loss(state.float(), target.float()) / target.float().square().mean()
        for state, target in zip(states, targets, strict=True)
    ]
    return torch.stack(parts).mean()
