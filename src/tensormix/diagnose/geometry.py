"""Inter-layer geometry: the similarity map of a model and its drift from the dense one (arXiv 2605.25344, Eq. 5).

Layers are counted on the residual stream: layer 0 is what enters the first block (the embeddings), layer l is what
leaves block l, so that a model of L blocks has layers 0..L. The states are taken at the blocks themselves, *before* the
final norm; transformers' own last hidden state is normed and would not be comparable with the others. A dropped block
hands its input on, so its layer equals the one before it and the layers of two checkpoints always correspond.

Legend: P prompts, L blocks, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.evaluate.choices import ChoicePrompt, encode
from tensormix.evaluate.forward import device_of, logits_at, pad_right, quiet
from tensormix.rows import Progress
from tensormix.sites import blocks


@contextmanager
def observe(layers: nn.ModuleList, states: dict[int, Tensor]) -> Iterator[None]:
    """While open, every forward pass leaves the residual stream (B, T, D) in `states`, by layer 0..L."""

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[0] = args[0] if args else kwargs["hidden_states"]

    def leaving(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[0].register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [block.register_forward_hook(leaving(index + 1)) for index, block in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_states(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ChoicePrompt],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:  # (P, L + 1, D)
    """The residual stream at each prompt's last token (the one before the answer), all layers, in fp32.

    Raises ValueError for an empty set, for a prompt longer than the context, and for a state that is not finite.
    """
    ids = encode(model, tokenizer, prompts)
    layers = blocks(model)
    parts = []
    with quiet(model):
        for start in range(0, len(ids), batch_size):
            rows, last = pad_right(ids[start : start + batch_size], device_of(model))
            seen: dict[int, Tensor] = {}
            with observe(layers, seen):
                logits_at(model, rows, last)
            at = torch.arange(len(rows), device=rows.device)
            parts.append(torch.stack([seen[layer][at, last].float().cpu() for layer in sorted(seen)], dim=1))
            if progress is not None:
                progress(start + len(rows), len(ids))
    states = torch.cat(parts)
    broken = (~states.isfinite()).any(dim=2).nonzero()
    if len(broken):
        prompt, layer = broken[0].tolist()
        raise ValueError(f"geometry: the hidden state of layer {layer} is not finite for prompt {prompts[prompt].id!r}")
    return states


def similarity_map(states: Tensor) -> Tensor:  # (P, L + 1, D) -> (L + 1, L + 1)
    """S(l, l') = mean over prompts of cos(h_l, h_l'), in fp64. A state of length zero is similar to nothing (0)."""
    unit = nn.functional.normalize(states.double(), dim=2, eps=torch.finfo(torch.float64).tiny)
    return torch.einsum("pld,pmd->lm", unit, unit) / len(states)


def similarity_rows(similarity: Tensor) -> list[dict[str, Any]]:  # (L + 1, L + 1)
    """The map above its diagonal (other > layer) as rows."""
    return _pair_rows("similarity", similarity)


def prompt_row(prompts: Sequence[ChoicePrompt]) -> dict[str, Any]:
    """Which prompts a map was taken on: maps of different prompts must not be compared."""
    text = "\n".join(f"{prompt.id}\t{prompt.text}" for prompt in prompts)
    return {"kind": "prompts", "num_prompts": len(prompts), "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def drift_map(rows: Sequence[dict[str, Any]], reference_rows: Sequence[dict[str, Any]]) -> Tensor:  # (L + 1, L + 1)
    """|S - S_dense| (Eq. 5) above the diagonal, from the diagnose rows of a checkpoint and of the dense model.

    Raises ValueError if either has no similarity map, or if they are of different layers or prompts.
    """
    own, dense = _map(rows, "this model"), _map(reference_rows, "the dense reference")
    if own.shape != dense.shape:
        raise ValueError(
            f"drift: this model has {len(own) - 1} blocks and the dense reference {len(dense) - 1}; "
            "the reference must be the same model before compression"
        )
    asked = [row["digest"] for row in (*rows, *reference_rows) if row["kind"] == "prompts"]
    if len(set(asked)) > 1:
        raise ValueError(
            "drift: the two similarity maps were taken on different prompts; diagnose both on the same set"
        )
    return (own - dense).abs()


def drift_rows(drift: Tensor) -> list[dict[str, Any]]:  # (L + 1, L + 1)
    """The drift of every pair, its profile (mean over all later layers, for each layer) and its two means as rows."""
    num_layers = len(drift)
    rows = _pair_rows("drift", drift)
    for layer in range(num_layers - 1):
        rows.append({"kind": "drift_profile", "layer": layer, "value": float(drift[layer, layer + 1 :].mean())})
    upper = torch.ones_like(drift, dtype=torch.bool).triu(1)
    late = upper.clone()
    late[: first_late_layer(num_layers - 1)] = False
    for region, pairs in (("all", upper), ("output", late)):
        rows.append({"kind": "drift_mean", "region": region, "value": float(drift[pairs].mean())})
    return rows


def first_late_layer(num_blocks: int) -> int:
    """The output-side pairs are those with both layers among the last third: layers L - L // 3 .. L, at least two."""
    return num_blocks - max(1, num_blocks // 3)


def geometry_rows(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ChoicePrompt],
    *,
    reference_rows: Sequence[dict[str, Any]] | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Similarity rows of a model, and with the dense model's rows as reference its drift rows too."""
    states = last_states(model, tokenizer, prompts, batch_size=batch_size, progress=progress)
    rows = [prompt_row(prompts), *similarity_rows(similarity_map(states))]
    if reference_rows is not None:
        rows += drift_rows(drift_map(rows, reference_rows))
    return rows


def _pair_rows(kind: str, values: Tensor) -> list[dict[str, Any]]:
    num_layers = len(values)
    pairs = [(layer, other) for layer in range(num_layers) for other in range(layer + 1, num_layers)]
    return [
        {"kind": kind, "layer": layer, "other": other, "value": float(values[layer, other])} for layer, other in pairs
    ]


def _map(rows: Sequence[dict[str, Any]], whose: str) -> Tensor:
    pairs = [(row["layer"], row["other"], row["value"]) for row in rows if row["kind"] == "similarity"]
    if not pairs:
        raise ValueError(f"drift: {whose} has no similarity rows; run its diagnose stage first")
    num_layers = max(other for _, other, _ in pairs) + 1
    values = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    for layer, other, value in pairs:
        values[layer, other] = value
    return values
