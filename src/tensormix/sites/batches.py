"""Token ids as people have them, in the one form that everything else takes: batches (B, T) without padding.

Shape letters: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

FORM = "token ids of shape (B, T)"
# Of a batch as a dictionary: what says nothing about the tokens that a model sees.
UNUSED = ("labels", "length", "special_tokens_mask", "overflow_to_sample_mapping", "offset_mapping", "text")


def batches_of(model: nn.Module, batches: Any, tokenizer: Any = None) -> Iterator[Tensor] | None:  # (B, T) each
    """Batches of token ids from what people have; None of None.

    A sequence that is padded is taken without its padding, alone or with its neighbours of the same length, so that no
    padding enters a statistic and a model needs no mask. Each batch is read when it is asked for.

    Args:
        model: whose embedding and positions the ids must fit.
        batches: one tensor (N, T), whose rows become batches of one; or an iterable, such as a DataLoader, of tensors
            (B, T), dictionaries or BatchEncodings with `input_ids` and, where padded, `attention_mask`, lists of ids,
            lists of such lists, or strings; or one string or dictionary.
        tokenizer: of strings.

    Raises:
        ValueError: something is none of these, a mask has gaps, an id has no embedding, or a sequence is longer than
            the positions of the model.
    """
    if batches is None:
        return None
    if isinstance(batches, Tensor) and batches.dim() != 2:
        raise _refused(f"{batches.dtype} {tuple(batches.shape)}")
    if isinstance(batches, Tensor):
        batches = batches.split(1)
    if isinstance(batches, str | Mapping):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise _refused(f"{type(batches).__name__}")
    return _checked(model, batches, tokenizer)


def _checked(model: nn.Module, batches: Iterable[Any], tokenizer: Any) -> Iterator[Tensor]:
    for batch in batches:
        for ids in _tokens(batch, tokenizer):
            _check_fits(model, ids)
            yield ids


def _tokens(batch: Any, tokenizer: Any) -> Iterable[Tensor]:  # (B, T) each
    """One item as people have it, in one batch or several."""
    if isinstance(batch, Sequence) and len(batch) == 1 and isinstance(batch[0], Tensor) and batch[0].dim() == 2:
        batch = batch[0]  # as a DataLoader over tensors alone gives them
    if isinstance(batch, Mapping):
        return _without_padding(batch)
    if isinstance(batch, str) or (_is_list(batch) and len(batch) and isinstance(batch[0], str)):
        if tokenizer is None:
            raise ValueError(
                f"a calibration batch must be {FORM}, got a string; tokenise it, or say tokenizer= as well"
            )
        texts = [batch] if isinstance(batch, str) else batch
        return _grouped(torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts)
    if _is_list(batch) and len(batch):
        if all(isinstance(token, int) for token in batch):
            return [_ids(batch)[None]]
        if all(_is_list(row) or (isinstance(row, Tensor) and row.dim() == 1) for row in batch):
            return _grouped(_ids(row) for row in batch)
        raise _refused(f"a {type(batch).__name__} of {type(batch[0]).__name__}")
    ids = _ids(batch)
    if ids.dim() != 2:
        raise _refused(f"{ids.dtype} {tuple(ids.shape)}")
    return [ids]


def _ids(value: Any) -> Tensor:
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise _refused(type(value).__name__) from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _refused(f"{ids.dtype} {tuple(ids.shape)}")
    return ids


def _without_padding(batch: Mapping[str, Any]) -> Iterable[Tensor]:  # (B, T) each
    if "input_ids" not in batch:
        raise _refused(f"a {type(batch).__name__} without input_ids (it has: {', '.join(map(str, batch))})")
    odd = [key for key in batch if key not in ("input_ids", "attention_mask", "token_type_ids", *UNUSED)]
    odd = [key for key in odd if isinstance(batch[key], Tensor) and not batch[key].dim() == 0]
    if odd:
        raise ValueError(f"a calibration batch is {FORM} and their attention_mask, and this one has {', '.join(odd)}")
    rows, masks = _rows(batch["input_ids"]), _rows(batch.get("attention_mask"))
    if masks is None:
        return _tokens(rows, None)
    rows, masks = [_ids(row) for row in rows], [torch.as_tensor(mask) for mask in masks]
    if [row.shape for row in rows] != [mask.shape for mask in masks] or any(row.dim() != 1 for row in rows):
        shapes = f"{[tuple(row.shape) for row in rows]} and {[tuple(mask.shape) for mask in masks]}"
        raise ValueError(f"input_ids and attention_mask must both be (B, T), got rows of {shapes}")
    if isinstance(batch["input_ids"], Tensor) and all(bool(mask.all()) for mask in masks):
        return [batch["input_ids"]]
    return _grouped(_real(row, mask != 0) for row, mask in zip(rows, masks, strict=True))


def _rows(value: Any) -> Any:
    """The rows of a part of a batch; one row of a data set is one."""
    if isinstance(value, Tensor) and value.dim() == 1:
        return value[None]
    if not _is_list(value) or not len(value):
        return value
    if all(isinstance(row, Tensor) and row.dim() == 1 for row in value) and len({len(row) for row in value}) == 1:
        raise ValueError(
            f"a calibration batch must be {FORM}, got a list of tensors, which is what a DataLoader makes of lists: "
            "the first tokens of all rows, then the second; give the data set the format torch, or the DataLoader a "
            "collate_fn that pads"
        )
    return [value] if all(isinstance(token, int) for token in value) else value


def _real(row: Tensor, mask: Tensor) -> Tensor:  # (T,) each
    """The tokens of one sequence, whose padding is at its beginning, its end or both."""
    places = mask.nonzero().flatten()
    if len(places) and int(places[-1] - places[0]) + 1 != len(places):
        raise ValueError(
            "the attention_mask of a calibration batch has gaps between tokens; only padding can be masked"
        )
    return row[places]


def _grouped(sequences: Iterable[Tensor]) -> Iterator[Tensor]:  # (T,) each -> (B, T) each
    """Neighbours of the same length together; of sequences without tokens nothing."""
    for length, same in groupby(sequences, key=len):
        if length:
            yield torch.stack(list(same))


def _check_fits(model: nn.Module, ids: Tensor) -> None:
    if ids.numel() == 0:
        raise _refused(f"{tuple(ids.shape)}, which has no tokens")
    find: Any = getattr(model, "get_input_embeddings", None)
    table = getattr(find(), "weight", None) if find is not None else None
    if table is not None and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(
            f"the token id {wrong} of a calibration batch has no embedding: the model knows 0 to {table.shape[0] - 1}; "
            "take the model's own tokenizer, or resize_token_embeddings if tokens were added to it"
        )
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < ids.shape[1]:
        raise ValueError(
            f"a calibration batch has {ids.shape[1]} tokens in a row, and the model has {most} positions "
            f"(max_position_embeddings); take windows of at most {most} tokens"
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _refused(what: str) -> ValueError:
    return ValueError(f"a calibration batch must be {FORM}, got {what}")
