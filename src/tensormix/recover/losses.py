"""The losses of distillation.

Shape letters: ... positions, V vocabulary, K tokens kept of each position, M tokens drawn from the others, B windows,
T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Kept(NamedTuple):
    """What is kept of a teacher's distributions: K tokens exactly, and M draws from all others."""

    tokens: Tensor  # (..., K) integers, the most probable
    values: Tensor  # (..., K) their log-probabilities, fp16
    tail: Tensor  # (...) the probability of all others
    drawn: Tensor  # (..., M) integers, drawn from the others by their probability; one may be there several times
    drawn_values: Tensor  # (..., M) their log-probabilities, fp16


def keep(logits: Tensor, top_k: int, tail_samples: int, seed: int) -> Kept:  # (..., V)
    """What is kept of a teacher's logits. The draws are systematic, with one random offset for each position: a token
    outside the first K is drawn M p / tail times on average, so that a sum over the draws is an unbiased sum over all.

    The log-probabilities are rounded to fp16 and the tail is what is missing to 1 after that (never below 0), so that
    what is kept is a distribution again.
    """
    all_values = logits.float().log_softmax(-1)
    values, tokens = all_values.topk(min(top_k, logits.shape[-1]))
    # the smallest number of fp16 stands for minus infinity: a teacher that is certain has nothing else to give
    least = torch.finfo(torch.float16).min
    values = values.clamp(min=least).half()
    tail = (1 - values.double().exp().sum(-1)).clamp(min=0).float()
    count = 0 if tokens.shape[-1] == logits.shape[-1] else tail_samples
    edges = all_values.exp().scatter(-1, tokens, 0.0).cumsum(-1)
    offsets = torch.rand(tail.shape, generator=torch.Generator().manual_seed(seed)).to(edges.device)
    places = (torch.arange(count, device=edges.device) + offsets[..., None]) / max(1, count) * edges[..., -1:]
    drawn = torch.searchsorted(edges, places, right=True).clamp(max=logits.shape[-1] - 1)
    drawn_values = all_values.gather(-1, drawn).clamp(min=least).half()
    return Kept(tokens.int(), values, tail, drawn.int(), drawn_values)


def kept_divergence(student: Tensor, kept: Kept) -> Tensor:  # (..., V) logits -> (...)
    """KL(teacher || student) in nats at every position, from what is kept of the teacher.

    The kept tokens count exactly. The others count by the draws, which makes value and gradient unbiased (Anshumann et
    al. 2025, arXiv 2503.16870). To count all others as one event would leave out how the mass is divided among them:
    the student may then forget the rare tokens, one perplexity point after another, while this loss falls.
    """
    student = student.float()
    total = student.logsumexp(-1, keepdim=True)

    def excess(tokens: Tensor, values: Tensor) -> Tensor:  # log p - log q of these tokens
        return values.float() - student.gather(-1, tokens.long()) + total

    exact = (kept.values.float().exp() * excess(kept.tokens, kept.values)).sum(-1)
    if kept.drawn.shape[-1] == 0:
        return exact
    return exact + kept.tail * excess(kept.drawn, kept.drawn_values).mean(-1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:  # (..., V) logits each -> (...)
    """KL(teacher || student) in nats at every position, over the whole vocabulary."""
    wanted = teacher.float().log_softmax(-1)
    return (wanted.exp() * (wanted - student.float().log_softmax(-1))).sum(-1)


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
