"""Token perplexity: exp of the mean negative log-likelihood of the scored tokens.

The text is cut into windows that begin at 0, stride, 2 * stride, ... and end at most `window` tokens later; the last
one may be shorter. Every token is scored once, in the first window that holds it, where it has the most tokens before
it. With stride == window the windows are disjoint (the GPTQ convention, but without dropping the end of the text);
with stride < window a token past the first window sees at least window - stride tokens before it.

What BOS means: with `bos_id`, that token is put in front of *each window*, so that the model never starts without it
and the window's first token is scored too; the model then reads window + 1 tokens. Text that was packed with BOS
between its documents already holds the BOS tokens where they belong: leave `bos_id` out, and the first token of the
first window (of every window if they are disjoint) has no context and is not scored. A BOS inside packed text is a
token like any other: predicting it is predicting the end of the document before it.

Losses are computed in fp32 from the model's logits and summed in fp64.

Legend: T tokens of a window, N tokens of the text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.evaluate.batches import Asked, BatchSize
from tensormix.evaluate.forward import context_length, device_of, dtype_of, options_of, pad_right, quiet
from tensormix.rows import Progress

Window = tuple[int, int, int]  # begin, first scored token, end: positions in the text


def windows(num_tokens: int, window: int, stride: int, bos: bool) -> list[Window]:
    """The windows (begin, first scored token, end) over a text; scored ranges are disjoint and in order."""
    spans = []
    scored = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        first = scored if bos else max(scored, begin + 1)  # without BOS a window's first token has no context
        if first < end:
            spans.append((begin, first, end))
        scored = end
        if end == num_tokens:
            break
    return spans


def perplexity(
    model: nn.Module,
    token_ids: Tensor,  # (N,) integers
    *,
    window: int,
    stride: int,
    text: str,
    bos_id: int | None = None,
    batch_size: Asked | BatchSize = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One row of kind "perplexity" for a tokenised text named `text`.

    `window` and `stride` count tokens of the text; `bos_id`, if given, is put in front of each window. `loss` in the
    row is the mean negative log-likelihood in nats, `num_tokens` the number of scored tokens; a mean loss too large
    for exp gives an infinite `value`.

    Raises ValueError for an empty text, a text shorter than one window, a window that the model cannot read, a stride
    outside 1..window, and logits that are NaN.
    """
    check_text(model, token_ids, window, stride, text, bos_id)
    spans = windows(len(token_ids), window, stride, bos_id is not None)
    total = torch.zeros((), dtype=torch.float64)
    with quiet(model):
        done = 0
        for some, loss in BatchSize(batch_size).each(
            spans, lambda part, _: _loss(model, token_ids, part, text, bos_id)
        ):
            total += loss
            done += len(some)
            if progress is not None:
                progress(done, len(spans))
    num_tokens = sum(end - first for _, first, end in spans)
    mean = float(total) / num_tokens
    return {
        "kind": "perplexity",
        "text": text,
        "value": math.exp(mean) if mean < 700 else math.inf,  # exp overflows fp64 at 709.8
        "loss": mean,
        "num_tokens": num_tokens,
        "window": window,
        "stride": stride,
        "bos": bos_id is not None,
        "dtype": dtype_of(model),
    }


def _loss(model: nn.Module, token_ids: Tensor, spans: Sequence[Window], text: str, bos_id: int | None) -> Tensor:
    """Sum of the losses (nats, fp64) of some windows."""
    lead = [] if bos_id is None else [bos_id]
    rows = [lead + token_ids[begin:end].tolist() for begin, _, end in spans]
    ids, _ = pad_right(rows, device_of(model))
    logits = model(ids, **options_of(model, use_cache=False)).logits
    total = torch.zeros((), dtype=torch.float64)
    for row, (begin, first, end) in enumerate(spans):
        # the logits that predict token t stand one place before it
        before = slice(first - begin + len(lead) - 1, end - begin + len(lead) - 1)
        target = token_ids[first:end].to(logits.device)
        losses = F.cross_entropy(logits[row, before].float(), target, reduction="none")
        if losses.isnan().any():
            raise ValueError(
                f"perplexity of {text!r}: the model's logits are NaN in the window of tokens {begin} to {end - 1} of "
                "the text"
            )
        total += losses.double().sum().cpu()
    return total


def check_text(model: nn.Module, token_ids: Tensor, window: int, stride: int, text: str, bos_id: int | None) -> None:
    extra = 0 if bos_id is None else 1
    smallest = 2 - extra
    limit = context_length(model)
    num_tokens = len(token_ids)
    if num_tokens == 0:
        raise ValueError(f"perplexity of {text!r}: the text is empty, it has no tokens")
    if window < smallest:
        raise ValueError(f"perplexity of {text!r}: window must be at least {smallest} to score a token, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(
            f"perplexity of {text!r}: stride must be in 1..{window} (the window), got {stride}; "
            "a larger one would leave tokens out"
        )
    if limit is not None and window + extra > limit:
        reads = f"a window of {window} tokens" + (" and the BOS in front of it" if extra else "")
        raise ValueError(
            f"perplexity of {text!r}: {reads} is longer than the {limit} tokens that the model reads at once; "
            f"the largest usable window is {min(limit - extra, num_tokens)}"
        )
    if num_tokens < window:
        raise ValueError(
            f"perplexity of {text!r}: the text has {num_tokens} tokens, fewer than one window of {window}; "
            f"the largest usable window is {num_tokens}"
        )
