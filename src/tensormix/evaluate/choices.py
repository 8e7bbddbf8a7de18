"""Accuracy on four-choice questions, from the logits of " A", " B", " C", " D" after the prompt.

Each question costs one forward pass; the predicted answer is the largest of the four logits at the prompt's last token,
which for one-token answers is the choice with the largest likelihood (the protocol of MMLU in lm-evaluation-harness).
Prompts of one subject mostly begin with the same examples: their common tokens are read once and kept as keys and
values (`share_prefix`), which changes the logits by no more than rounding.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.evaluate.batches import Asked, BatchSize
from tensormix.evaluate.forward import context_length, device_of, logits_at, options_of, pad_right, quiet
from tensormix.rows import Progress

LETTERS = ("A", "B", "C", "D")
SHORTEST_PREFIX = 16  # tokens; below this a cache saves less than it costs


@dataclass(frozen=True, kw_only=True)
class ChoicePrompt:
    """A question as text that ends in "Answer:", with the index 0..3 of its right answer."""

    id: str
    subject: str
    text: str
    gold: int


def answer_tokens(tokenizer: Any) -> list[int]:
    """The tokens of " A", " B", " C", " D" as they follow "Answer:".

    They are read off behind the context, as some tokenizers begin every text with a space of their own.
    Raises ValueError if an answer is not exactly one token, or if two answers are the same token.
    """
    context = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    found = []
    for letter in LETTERS:
        whole = tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"]
        rest = whole[len(context) :]
        if whole[: len(context)] != context or len(rest) != 1:
            tokens = tokenizer.convert_ids_to_tokens(rest if whole[: len(context)] == context else whole)
            raise ValueError(
                f"the answer ' {letter}' must be one token after 'Answer:', but this tokenizer makes it "
                f"{len(tokens)}: {tokens}; four-choice questions need a tokenizer with one token per letter"
            )
        if rest[0] in found:
            raise ValueError(
                f"the answers ' {LETTERS[found.index(rest[0])]}' and ' {letter}' are the same token "
                f"{tokenizer.convert_ids_to_tokens(rest)} for this tokenizer; they cannot be told apart"
            )
        found.append(rest[0])
    return found


def encode(model: nn.Module, tokenizer: Any, prompts: Sequence[ChoicePrompt]) -> list[list[int]]:
    """Token ids of each prompt, with the tokens that the tokenizer puts in front (BOS) but none behind.

    Raises ValueError for an empty set, and for prompts longer than the model's context: they are never cut.
    """
    if not prompts:
        raise ValueError("there are no questions to ask: the set of prompts is empty")
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt.text)["input_ids"]
        bare = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        while len(ids) > len(bare) and ids[-1] != bare[-1]:  # a closing token would stand before the answer
            ids = ids[:-1]
        rows.append(ids)
    limit = context_length(model)
    long = [(len(ids), prompt.id) for ids, prompt in zip(rows, prompts, strict=True) if limit and len(ids) > limit]
    if long:
        tokens, name = max(long)
        raise ValueError(
            f"{len(long)} of {len(prompts)} prompts are longer than the {limit} tokens that the model reads at once; "
            f"the longest is {name!r} with {tokens} tokens: ask with fewer examples (shots)"
        )
    return rows


def evaluate_choices(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ChoicePrompt],
    *,
    batch_size: Asked | BatchSize,
    progress: Progress | None = None,
    task: str = "exam",
    share_prefix: bool = True,
) -> list[dict[str, Any]]:
    """Rows of kind "accuracy" (subject "all", then each subject) and of kind "answer" (each prompt, in order).

    `low` and `high` are the Wilson 95 % interval of the accuracy. Logits are kept in fp32.
    Raises ValueError for what `answer_tokens` and `encode` refuse, and for logits that are NaN.
    """
    tokens = answer_tokens(tokenizer)
    ids = encode(model, tokenizer, prompts)
    logits: list[list[float]] = [[] for _ in prompts]
    done, size = 0, BatchSize(batch_size)
    with quiet(model):
        for group in _groups(prompts, share_prefix):
            for batch, values in _logits(model, ids, group, size, share_prefix):
                for index, row in zip(batch, values[:, tokens].tolist(), strict=True):
                    if any(math.isnan(value) for value in row):
                        raise ValueError(f"{task}: the model's logits are NaN for question {prompts[index].id!r}")
                    logits[index] = row
                done += len(batch)
                if progress is not None:
                    progress(done, len(prompts))
    answers = [_answer(prompt, row, task) for prompt, row in zip(prompts, logits, strict=True)]
    return accuracy_rows(answers) + answers


def accuracy_rows(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy over all answer rows (subject "all") and by subject, with the Wilson 95 % interval."""
    sets = {"all": list(answers)}
    for row in answers:
        sets.setdefault(row["subject"], []).append(row)
    rows = []
    for subject, members in sets.items():
        right = sum(row["predicted"] == row["gold"] for row in members)
        low, high = wilson(right, len(members))
        rows.append(
            {
                "kind": "accuracy",
                "task": members[0]["task"],
                "subject": subject,
                "value": right / len(members),
                "low": low,
                "high": high,
                "num_questions": len(members),
            }
        )
    return rows


def wilson(right: int, num_questions: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a binomial fraction (1927); z = 1.96 gives 95 %."""
    fraction = right / num_questions
    shrink = 1 + z * z / num_questions
    centre = (fraction + z * z / (2 * num_questions)) / shrink
    half = z / shrink * math.sqrt(fraction * (1 - fraction) / num_questions + (z / (2 * num_questions)) ** 2)
    # at 0 and 1 the ends are exact; rounding must not push them off
    return (0.0 if right == 0 else centre - half), (1.0 if right == num_questions else centre + half)


def _answer(prompt: ChoicePrompt, logits: list[float], task: str) -> dict[str, Any]:
    return {
        "kind": "answer",
        "task": task,
        "subject": prompt.subject,
        "id": prompt.id,
        "gold": prompt.gold,
        "predicted": max(range(4), key=logits.__getitem__),
        "logits": logits,
    }


def _groups(prompts: Sequence[ChoicePrompt], share_prefix: bool) -> list[list[int]]:
    """Indices of the prompts that are asked together: a subject each, or all of them."""
    if not share_prefix:
        return [list(range(len(prompts)))]
    subjects: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        subjects.setdefault(prompt.subject, []).append(index)
    return list(subjects.values())


def _logits(
    model: nn.Module, ids: list[list[int]], group: list[int], batch_size: BatchSize, share_prefix: bool
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Batches of prompt indices with the logits (B, V) behind each; longest first, to meet a lack of memory soon."""
    device = device_of(model)
    order = sorted(group, key=lambda index: len(ids[index]), reverse=True)
    prefix = common_prefix([ids[index] for index in group]) if share_prefix and len(group) > 1 else 0
    cache = _read_prefix(model, ids[order[0]][:prefix], device) if prefix >= SHORTEST_PREFIX else None
    if cache is None:
        prefix = 0

    def read(batch: Sequence[int], _: int) -> Tensor:
        rows, last = pad_right([ids[index][prefix:] for index in batch], device)
        own = copy.deepcopy(cache)  # the model extends what it is given
        if own is not None:
            own.batch_repeat_interleave(len(batch))
        return logits_at(model, rows, last, own)

    yield from batch_size.each(order, read, cost=lambda batch: len(batch) * (len(ids[batch[0]]) - prefix))


def common_prefix(rows: list[list[int]]) -> int:
    """Number of first tokens that all rows share, leaving at least one token of each row."""
    low, high = min(rows), max(rows)  # the first difference of all rows is that of the extremes in dictionary order
    limit = min(len(row) for row in rows) - 1
    return next((place for place in range(limit) if low[place] != high[place]), limit)


def _read_prefix(model: nn.Module, ids: list[int], device: torch.device) -> Any:
    """Keys and values of the first tokens, or None where the model's cache cannot stand for them.

    transformers takes the number of cached tokens from the first block. Where that block was dropped, or a layer keeps
    only part of the past (sliding windows, recurrent states), the prompts are read in full instead.
    """
    options = options_of(model, use_cache=True, logits_to_keep=1, past_key_values=None)
    if not {"use_cache", "past_key_values"} <= options.keys():
        return None
    cache = getattr(model(torch.tensor([ids], device=device), **options), "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer).__name__ != "DynamicLayer" for layer in layers):
        return None
    lengths = [layer.get_seq_length() for layer in layers]
    return cache if lengths[0] == len(ids) and set(lengths) <= {0, len(ids)} else None
