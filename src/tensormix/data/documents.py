"""Documents from files, the Hub, the exam or its facts, and which of their characters are answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tensormix.data.conversations import Conversations
from tensormix.exam import documents, facts
from tensormix.settings import Source

ANSWER = re.compile(r"Answer:( [A-D])(?=\n|$)")


class Document(NamedTuple):
    text: str
    answers: tuple[tuple[int, int], ...] | None = None  # first and last + 1 of the characters that count; None: all


def describe(source: Source) -> str:
    """A short name for rows and messages."""
    if source.file is not None:
        return Path(source.file).name
    if source.hub is not None:
        return source.hub
    return "exam" if source.exam else "facts"


def read_documents(source: Source, tokenizer: Any = None, answers_only: bool = False) -> Iterator[Document]:
    """The documents of a source; those of the exam and of the facts never end.

    Args:
        tokenizer: has the chat template in which conversations are written; only sources with `chat` need it.
        answers_only: find the answers of every document: the letters of exam questions, what the assistant says in a
            conversation, the last of several fields. Of text that asks nothing everything counts.

    Raises:
        ValueError: no such file, an unknown kind of file, a broken line, a missing field, a tokenizer without a chat
            template, a template whose answers cannot be found (all name the source).
    """
    if source.exam or source.facts:
        found = exam_documents(source.seed, answers_only) if source.exam else map(Document, facts(source.seed))
        return islice(found, source.num_documents)
    if source.hub is not None:
        records, where = _hub_records(source), str(source.hub)
    else:
        records, where = _file_records(Path(str(source.file)), source.field), str(source.file)
    if source.chat is None:
        found = (_document_of(item, source.field, where, number, answers_only) for number, item in records)
    else:
        found = _conversations(source, tokenizer, records, where, answers_only)
    return islice(islice(found, source.skip_documents, None), source.num_documents)


def exam_documents(seed: int, answers_only: bool) -> Iterator[Document]:
    for text in documents(seed):
        yield Document(text, tuple(m.span(1) for m in ANSWER.finditer(text)) if answers_only else None)


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


def _document_of(item: Any, field: str, where: str, number: int, answers_only: bool) -> Document:
    """One item; of several fields, joined by +, the last is the answer to the others."""
    text = _text_of(item, field, where, number)
    if not answers_only or isinstance(item, str) or "+" not in field:
        return Document(text)
    answer = item[field.rpartition("+")[2]].strip()
    return Document(text, ((len(text) - len(answer), len(text)),) if answer else ())


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


def _conversations(
    source: Source, tokenizer: Any, records: Iterator[tuple[int, Any]], where: str, answers_only: bool
) -> Iterator[Document]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"data: {describe(source)} asks for chat, and the model's tokenizer has no chat template; "
            "leave out chat and name the fields as field: a+b."
        )
    template = Conversations(tokenizer)
    for number, item in records:
        name, messages = f"item {number} of {where}", _messages(source.chat, item, where, number)
        text = template.write(messages, name)
        answers = template.answers(messages, text, name) if answers_only else None
        bos = tokenizer.bos_token or ""  # packing puts it there
        if bos and text.startswith(bos):
            text = text.removeprefix(bos)
            answers = None if answers is None else [(max(0, a - len(bos)), b - len(bos)) for a, b in answers]
        yield Document(text, None if answers is None else tuple(answers))


def _messages(chat: str | dict[Any, str] | None, item: Any, where: str, number: int) -> list[dict[str, Any]]:
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
