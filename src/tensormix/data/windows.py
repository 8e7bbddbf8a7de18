"""Documents packed into windows of tokens, and which of their tokens count.

Shape letters: N tokens of a source, B windows, T tokens per window.
Documents are packed one after another with the tokenizer's BOS token (EOS where it has none) before each.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from random import Random
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tensormix.data.documents import Document, Understood, describe, exam_documents, read_documents
from tensormix.exam import facts
from tensormix.settings import Source

IGNORED = -100  # the label that transformers leaves out of the loss
ENDLESS_DOCUMENTS = 2_000  # how many documents of an endless source stand for it where a finite text is needed
HELD_OUT_PART = 10  # of a finite text at most one window in so many is held out
TRIED_WINDOWS = 20  # of an endless source, one of which must hold an answer


def separator_of(tokenizer: Any) -> int | None:
    """The token put before each document: BOS, else EOS, else none."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


class Packed(NamedTuple):
    """A row of tokens, or windows of it. `counted` says whose label counts, one byte each; None: all."""

    ids: Tensor  # (N,) or (B, T)
    counted: Tensor | None


def encode(tokenizer: Any, document: Document) -> tuple[list[int], bytes]:
    """Ids of one document without special tokens, and for each of them 1 if it counts, 0 if not.

    A token counts that holds a character of an answer.

    Raises:
        ValueError: only answers count, and the tokenizer does not say which characters a token holds.
    """
    if document.answers is None:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, b"\1" * len(ids)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"data: loss_on: answers needs a tokenizer that says which characters each token holds, and "
            f"{type(tokenizer).__name__} does not; take loss_on: all, or the model's fast tokenizer (tokenizer.json)."
        )
    encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = bytes(
        any(start < last and first < stop for start, stop in document.answers)
        for first, last in encoded["offset_mapping"]
    )
    return encoded["input_ids"], counted


def pack(tokenizer: Any, documents: Iterable[Document]) -> Packed:
    """All documents as one row of tokens, the separator before each; empty documents are left out.

    A separator that is the EOS token ends what stands before it, so it counts after an answer.
    """
    separator, ids, counted = separator_of(tokenizer), array("q"), bytearray()
    ends = separator is not None and separator == tokenizer.eos_token_id
    for document in documents:
        if document.text:
            new, which = encode(tokenizer, document)
            if separator is not None:
                answered = ends and counted[-1:] == b"\1" and ids[-1] != separator
                ids.append(separator)
                counted.append(document.answers is None or answered)
            ids.extend(new)
            counted += which
    if not ids:
        return Packed(torch.empty(0, dtype=torch.long), None)
    marks = None if all(counted) else torch.frombuffer(counted, dtype=torch.bool)
    return Packed(torch.frombuffer(ids, dtype=torch.long), marks)


def packed_source(tokenizer: Any, source: Source) -> Tensor:  # (N,)
    """A source as one row of tokens; of an endless source without `num_documents` the first 2,000 documents.

    Raises:
        ValueError: the source holds no text.
    """
    return _packed(tokenizer, source, answers_only=False).ids


def _packed(tokenizer: Any, source: Source, answers_only: bool) -> Packed:
    endless = (source.exam or source.facts) and source.num_documents is None
    understood = Understood(source)
    found = read_documents(source, tokenizer, answers_only, understood)
    packed = pack(tokenizer, islice(found, ENDLESS_DOCUMENTS if endless else None))
    if len(packed.ids) == 0:
        skipped = f" after its first {source.skip_documents} documents" if source.skip_documents else ""
        empty = f"; of its records {understood.empty} are empty" if understood.empty else ""
        raise ValueError(f"data: {describe(source)} holds no text{skipped}{empty}.")
    understood.say(len(packed.ids))
    return packed


class Mixture(Dataset):
    """`num_windows` training windows of weighted sources, interleaved; window i is a function of the seed and i alone.

    A text of finite length is cut into disjoint windows that are all used once, in shuffled order, before any is used
    again; those that are held out are never among them. An endless source makes new documents for every window. Where
    only answers count, windows of a finite text that hold none are left out: nothing can be learned from them.

    Raises:
        ValueError: a source shorter than one window, or without any answer where only answers count.
    """

    def __init__(
        self,
        tokenizer: Any,
        sources: Sequence[Source],
        *,
        window: int,  # tokens
        num_windows: int,
        seed: int,
        answers_only: bool = False,  # count the loss of exams, conversations and several fields on their answers alone
        num_held_out: int = 0,  # windows that are kept apart, of finite texts at most a tenth of theirs
    ) -> None:
        self.tokenizer, self.sources, self.window, self.seed = tokenizer, list(sources), window, seed
        self.answers_only = answers_only
        weights = [source.weight for source in self.sources]
        self.chosen = interleaved(weights, num_windows, seed)
        counts = [0] * len(self.sources)
        self.turn = []  # how often the source of window i was drawn before
        for source in self.chosen:
            self.turn.append(counts[source])
            counts[source] += 1
        self.held_out: list[dict[str, Tensor]] = []  # as __getitem__ gives them
        shares = [math.ceil(num_held_out * weight / sum(weights)) for weight in weights]
        self.windows = [self._opened(source, share) for source, share in zip(self.sources, shares, strict=True)]

    def _opened(self, source: Source, share: int) -> Packed | None:
        """What windows are taken from, without the `share` of them that is held out; None of an endless source."""
        if source.exam or source.facts:
            self._check(source)
            self.held_out += [self._generate(source, f"held out {number}") for number in range(share)]
            return None
        cut = self._cut(source)
        order = torch.randperm(len(cut.ids), generator=torch.Generator().manual_seed(self.seed))
        apart = order[: min(share, len(order) // HELD_OUT_PART)]
        self.held_out += [_window(cut, place) for place in apart]
        rest = torch.ones(len(order), dtype=torch.bool)
        rest[apart] = False
        return Packed(cut.ids[rest], None if cut.counted is None else cut.counted[rest])

    def _check(self, source: Source) -> None:
        """Refuse an exam of which no answer fits into a window."""
        if self.answers_only and source.exam:
            tried = (self._generate(source, index)["labels"][1:] for index in range(TRIED_WINDOWS))
            if not any((labels != IGNORED).any() for labels in tried):
                raise ValueError(
                    f"data: no answer of the exam lies in a window of {self.window} tokens, and loss_on: answers "
                    "counts nothing else; take a longer window."
                )

    def _cut(self, source: Source) -> Packed:  # (B, T)
        ids, counted = _packed(self.tokenizer, source, self.answers_only)
        if len(ids) < self.window:
            raise ValueError(
                f"data: {describe(source)} has {len(ids)} tokens, shorter than one window of {self.window}; "
                f"the largest possible window is {len(ids)}."
            )
        whole = len(ids) // self.window * self.window
        ids = ids[:whole].view(-1, self.window)
        if counted is None:
            return Packed(ids, None)
        counted = counted[:whole].view(-1, self.window)
        useful = counted[:, 1:].any(1)  # nothing predicts the first token of a window
        if not useful.any():
            raise ValueError(
                f"data: {describe(source)} has no answer in any of its windows, and loss_on: answers counts nothing "
                "else; take loss_on: all, or conversations in which an assistant speaks."
            )
        return Packed(ids, counted) if useful.all() else Packed(ids[useful], counted[useful])

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # input_ids (T,), labels (T,)
        number = self.chosen[index]
        windows = self.windows[number]
        if windows is None:
            return self._generate(self.sources[number], index)
        epoch, place = divmod(self.turn[index], len(windows.ids))
        order = torch.randperm(len(windows.ids), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return _window(windows, order[place])

    def _generate(self, source: Source, index: int | str) -> dict[str, Tensor]:
        own_seed = Random(f"{self.seed}/{source.seed}/{index}").getrandbits(48)
        found = exam_documents(own_seed, self.answers_only) if source.exam else map(Document, facts(own_seed))
        separator = separator_of(self.tokenizer)
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < self.window:
            new, counted = encode(self.tokenizer, next(found))
            if separator is not None:
                ids.append(separator)
                labels.append(IGNORED)
            ids += new
            labels += [token if counts else IGNORED for token, counts in zip(new, counted, strict=True)]
        return {"input_ids": torch.tensor(ids[: self.window]), "labels": torch.tensor(labels[: self.window])}


def interleaved(weights: Sequence[float], count: int, seed: int) -> list[int]:
    """A source for each of `count` windows, so that every row of neighbours has its share of each source to within a
    window. Drawn independently, whole steps would read one kind of text, and a model learns from those first.

    The next window is of the source that is furthest behind its share; which of several is drawn.
    """
    random, shares = Random(f"mixture/{seed}"), [weight / sum(weights) for weight in weights]
    chosen, counts = [], [0] * len(weights)
    for number in range(1, count + 1):
        behind = [round(share * number - done, 9) for share, done in zip(shares, counts, strict=True)]
        source = random.choice([place for place, value in enumerate(behind) if value == max(behind)])
        counts[source] += 1
        chosen.append(source)
    return chosen


def _window(windows: Packed, place: Tensor | int) -> dict[str, Tensor]:  # input_ids (T,), labels (T,)
    ids = windows.ids[place]
    return {"input_ids": ids, "labels": ids if windows.counted is None else ids.where(windows.counted[place], IGNORED)}


def calibration_batches(tokenizer: Any, source: Source, *, num_windows: int, window: int, seed: int) -> list[Tensor]:
    """`num_windows` windows (1, T) of one source, for methods that need statistics."""
    mixture = Mixture(tokenizer, [source], window=window, num_windows=num_windows, seed=seed)
    return [mixture[index]["input_ids"][None] for index in range(num_windows)]


class Windows(Protocol):
    """A section of a recipe that asks for windows of text."""

    @property
    def text(self) -> Source: ...
    @property
    def num_windows(self) -> int: ...
    @property
    def window(self) -> int: ...


def windows_of(tokenizer: Any, asked: Windows, seed: int) -> list[Tensor]:  # (1, T) each
    """The windows of tokens that a section of a recipe asks for. Raises ValueError as `calibration_batches`."""
    of = {"num_windows": asked.num_windows, "window": asked.window}
    return calibration_batches(tokenizer, asked.text, seed=seed, **of)
