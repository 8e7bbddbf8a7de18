"""Text from files, the Hub or the exam, turned into windows of tokens.

Shape letters: B windows, T tokens per window.
Documents are packed one after another with the tokenizer's BOS token (EOS where it has none) before each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tensormix.exam import documents, facts
from tensormix.settings import Source

IGNORED = -100  # the label that transformers leaves out of the loss
ANSWER = re.compile(r"Answer:( [A-D])(?=\n|$)")
ENDLESS_DOCUMENTS = 2_000  # how many documents of an endless source stand for it where a finite text is needed


def describe(source: Source) -> str:
    """A short name for rows and messages."""
    if source.file is not None:
        return Path(source.file).name
    if source.hub is not None:
        return source.hub
    return "exam" if source.exam else "facts"


def read_documents(source: Source, tokenizer: Any = None) -> Iterator[str]:
    """The documents of a source; those of the exam and of the facts never end.

    `tokenizer` has the chat template in which conversations are written; only sources with `chat` need it.

    Raises:
        ValueError: no such file, an unknown kind of file, a broken line, a missing field, a tokenizer without a chat
            template (all name the source).
    """
    if source.exam:
        return islice(documents(source.seed), source.num_documents)
    if source.facts:
        return islice(facts(source.seed), source.num_documents)
    if source.hub is not None:
        records, where = _hub_records(source), str(source.hub)
    else:
        records, where = _file_records(Path(str(source.file)), source.field), str(source.file)
    if source.chat is None:
        texts = (_text_of(item, source.field, where, number) for number, item in records)
    else:
        chat = _Chat(source, tokenizer)
        texts = (chat.write(item, where, number) for number, item in records)
    return islice(texts, source.num_documents)


def _file_records(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """The records of a file with their numbers, from 1."""
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}; give a .txt, .raw, .json or .jsonl file.")
    if path.suffix in (".txt", ".raw", ".tokens", ".md"):
        yield 1, path.read_text(encoding="utf-8")
    elif path.suffix == ".json":
        items = _parse(path.read_text(encoding="utf-8"), path, 1)
        if not isinstance(items, list):
            raise ValueError(f"data: {path} must hold a JSON list of texts or of objects with a field {field!r}.")
        yield from enumerate(items, 1)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line, path, number)
    else:
        raise ValueError(f"data: {path} has the unknown kind {path.suffix!r}; known: .txt, .raw, .json, .jsonl.")


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {path}, line {line} is not valid JSON: {error}.") from error


def _text_of(item: Any, field: str, where: str, number: int) -> str:
    """The text of one item, stripped. A field may be several, joined by +, put together with an empty line between."""
    if isinstance(item, str):
        return item.strip()
    parts = []
    for name in field.split("+"):
        if not isinstance(item, dict) or not isinstance(item.get(name), str):
            there = ", ".join(item) if isinstance(item, dict) else type(item).__name__
            raise ValueError(f"data: item {number} of {where} has no text field {name!r}; it has: {there}.")
        parts.append(item[name].strip())
    return "\n\n".join(part for part in parts if part)


class _Chat:
    """Writes records as conversations in the tokenizer's chat template, without the BOS that packing puts there."""

    def __init__(self, source: Source, tokenizer: Any) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"data: {describe(source)} asks for chat, and the model's tokenizer has no chat template; "
                "leave out chat and name the fields as field: a+b."
            )
        self.source, self.tokenizer = source, tokenizer

    def write(self, item: Any, where: str, number: int) -> str:
        messages = self._messages(item, where, number)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs, and raise what they like
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"data: item {number} of {where} does not fit the tokenizer's chat template: {reason}"
            ) from error
        return text.removeprefix(self.tokenizer.bos_token or "")

    def _messages(self, item: Any, where: str, number: int) -> list[dict[str, str]]:
        chat = self.source.chat
        if isinstance(chat, dict):
            parts = [{"role": role, "content": _text_of(item, field, where, number)} for role, field in chat.items()]
            return [message for message in parts if message["content"]]
        messages = item.get(chat) if isinstance(item, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
        ):
            raise ValueError(
                f"data: item {number} of {where} has no list of messages {chat!r}; "
                "each message is an object with role and content."
            )
        return messages


def _hub_records(source: Source) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(str(source.hub), source.config, split=source.split)
    except Exception as error:  # the Hub client raises a dozen unrelated types; each means that nothing could be read
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"data: the dataset {source.hub!r} cannot be read from the Hub or its cache: {reason}"
        ) from error
    yield from enumerate(rows, 1)


def separator_of(tokenizer: Any) -> int | None:
    """The token put before each document: BOS, else EOS, else none."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def encode(tokenizer: Any, text: str, answers_only: bool = False) -> tuple[list[int], list[int]]:
    """Ids and labels of one document without special tokens; `answers_only` ignores every label but the answers'."""
    if not answers_only:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, ids
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [match.span(1) for match in ANSWER.finditer(text)]
    labels = [
        token if any(start < stop and first < stop and start < last for start, stop in spans) else IGNORED
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def pack(tokenizer: Any, texts: Iterable[str]) -> Tensor:  # (N,)
    """All documents as one row of tokens, the separator before each; empty documents are left out."""
    separator, ids = separator_of(tokenizer), []
    for text in texts:
        if text:
            ids += [] if separator is None else [separator]
            ids += encode(tokenizer, text)[0]
    return torch.tensor(ids, dtype=torch.long)


def packed_source(tokenizer: Any, source: Source) -> Tensor:  # (N,)
    """A source as one row of tokens; of an endless source without `num_documents` the first 2,000 documents.

    Raises:
        ValueError: the source holds no text.
    """
    endless = (source.exam or source.facts) and source.num_documents is None
    ids = pack(tokenizer, islice(read_documents(source, tokenizer), ENDLESS_DOCUMENTS if endless else None))
    if len(ids) == 0:
        raise ValueError(f"data: {describe(source)} holds no text.")
    return ids


class Mixture(Dataset):
    """`num_windows` training windows drawn from weighted sources; window i is a function of the seed and i alone.

    A text of finite length is cut into disjoint windows that are all used once, in shuffled order, before any is used
    again. An endless source makes new documents for every window.
    """

    def __init__(
        self,
        tokenizer: Any,
        sources: Sequence[Source],
        *,
        window: int,  # tokens
        num_windows: int,
        seed: int,
        answers_only: bool = False,  # count the loss of exam sources on their answers alone
    ) -> None:
        self.tokenizer, self.sources, self.window, self.seed = tokenizer, list(sources), window, seed
        self.answers_only = answers_only
        random = Random(f"mixture/{seed}")
        weights = [source.weight for source in self.sources]
        self.chosen = random.choices(range(len(self.sources)), weights, k=num_windows)
        counts = [0] * len(self.sources)
        self.turn = []  # how often the source of window i was drawn before
        for source in self.chosen:
            self.turn.append(counts[source])
            counts[source] += 1
        self.windows = [None if s.exam or s.facts else self._cut(s) for s in self.sources]

    def _cut(self, source: Source) -> Tensor:  # (B, T)
        ids = packed_source(self.tokenizer, source)
        if len(ids) < self.window:
            raise ValueError(
                f"data: {describe(source)} has {len(ids)} tokens, shorter than one window of {self.window}; "
                f"the largest possible window is {len(ids)}."
            )
        return ids[: len(ids) // self.window * self.window].view(-1, self.window)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # input_ids (T,), labels (T,)
        number = self.chosen[index]
        windows = self.windows[number]
        if windows is None:
            return self._generate(self.sources[number], index)
        epoch, place = divmod(self.turn[index], len(windows))
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        ids = windows[order[place]]
        return {"input_ids": ids, "labels": ids}

    def _generate(self, source: Source, index: int) -> dict[str, Tensor]:
        own_seed = Random(f"{self.seed}/{source.seed}/{index}").getrandbits(48)
        texts = documents(own_seed) if source.exam else facts(own_seed)
        separator = separator_of(self.tokenizer)
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < self.window:
            new, counted = encode(self.tokenizer, next(texts), self.answers_only and source.exam)
            if separator is not None:
                ids.append(separator)
                labels.append(IGNORED)
            ids += new
            labels += counted
        return {"input_ids": torch.tensor(ids[: self.window]), "labels": torch.tensor(labels[: self.window])}


def calibration_batches(tokenizer: Any, source: Source, *, num_windows: int, window: int, seed: int) -> list[Tensor]:
    """`num_windows` windows (1, T) of one source, for methods that need statistics."""
    mixture = Mixture(tokenizer, [source], window=window, num_windows=num_windows, seed=seed)
    return [mixture[index]["input_ids"][None] for index in range(num_windows)]
