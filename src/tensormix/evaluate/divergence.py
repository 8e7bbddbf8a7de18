"""KL divergence of a compressed model from the dense one: how far its predictions have moved, token by token.

The mean over the scored tokens of KL(dense || compressed) = sum_v p_v (log p_v - log q_v), in nats. The windows are
those of `perplexity`, so the same tokens are scored. Differences of logarithms are taken in fp64.

Legend: B rows, T tokens of a window, N tokens of the text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.evaluate.batches import Asked, BatchSize
from tensormix.evaluate.forward import device_of, dtype_of, options_of, pad_right, quiet
from tensormix.evaluate.perplexity import Window, check_text, windows
from tensormix.rows import Progress

_CELLS = 1 << 22  # tokens times vocabulary that are in fp64 at a time


def divergences(dense: Tensor, compressed: Tensor) -> Tensor:  # (..., V), (..., V) -> (tokens,) fp64
    """KL(dense || compressed) in nats at each position, from the logits of both."""
    vocabulary = dense.shape[-1]
    pairs = zip(
        dense.reshape(-1, vocabulary).split(max(1, _CELLS // vocabulary)),
        compressed.reshape(-1, vocabulary).split(max(1, _CELLS // vocabulary)),
        strict=True,
    )
    found = []
    for ours, theirs in pairs:
        log_p, log_q = ours.double().log_softmax(-1), theirs.to(ours.device).double().log_softmax(-1)
        p = log_p.exp()
        found.append(torch.where(p > 0, p * (log_p - log_q), 0).sum(-1))  # 0 log 0 is 0
    return torch.cat(found)


def kl_divergence(
    model: nn.Module,
    dense: nn.Module,
    token_ids: Tensor,  # (N,) integers
    *,
    window: int,
    stride: int,
    text: str,
    bos_id: int | None = None,
    batch_size: Asked | BatchSize = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One row of kind "kl" for a tokenised text named `text`: `value` in nats, mean over `num_tokens` tokens.

    Both models read the same windows, one batch at a time; nothing of the size of the text is kept. Raises ValueError
    as `perplexity` does, if the vocabularies differ, and for logits that are NaN.
    """
    for asked in (dense, model):
        check_text(asked, token_ids, window, stride, text, bos_id)
    spans = windows(len(token_ids), window, stride, bos_id is not None)
    lead = [] if bos_id is None else [bos_id]
    total, num_tokens, done = 0.0, sum(end - first for _, first, end in spans), 0
    with quiet(model), quiet(dense):
        for some, value in BatchSize(batch_size).each(
            spans, lambda part, _: _divergence(dense, model, token_ids, part, text, lead)
        ):
            total += value
            done += len(some)
            if progress is not None:
                progress(done, len(spans))
    found = {"kind": "kl", "text": text, "value": total / num_tokens, "num_tokens": num_tokens}
    return {**found, "window": window, "stride": stride, "bos": bos_id is not None, "dtype": dtype_of(model)}


def _divergence(
    dense: nn.Module, model: nn.Module, token_ids: Tensor, spans: Sequence[Window], text: str, lead: list[int]
) -> float:
    """Sum of the divergences (nats) at the scored tokens of some windows."""
    rows, total = [lead + token_ids[begin:end].tolist() for begin, _, end in spans], 0.0
    ours, theirs = _logits(dense, rows), _logits(model, rows)
    if ours.shape != theirs.shape:
        sizes = f"{theirs.shape[-1]} and {ours.shape[-1]}"
        raise ValueError(f"KL on {text!r}: the vocabularies of the two models differ ({sizes} tokens)")
    for row, (begin, first, end) in enumerate(spans):
        before = slice(first - begin + len(lead) - 1, end - begin + len(lead) - 1)
        if theirs[row, before].isnan().any() or ours[row, before].isnan().any():
            raise ValueError(f"KL on {text!r}: logits are NaN in tokens {begin} to {end - 1} of the text")
        total += float(divergences(ours[row, before], theirs[row, before]).sum())
    return total


def _logits(model: nn.Module, rows: list[list[int]]) -> Tensor:  # (B, T, V)
    ids, _ = pad_right(rows, device_of(model))
    return model(ids, **options_of(model, use_cache=False)).logits
