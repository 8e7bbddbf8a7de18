"""Documents from files, the Hub, the exam or its facts, and which of their characters are answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tensormix.data.conversations import Conversations
from tensormix.data.files import Record, files_of, records_of
from tensormix.data.messages import messages_of
from tensormix.data.shapes import Shape, has_field, no_text, shape_of, value_at
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


_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def understood_by(listener: Callable[[str], None]) -> Iterator[None]:
    """While open, `listener` is told in one line what was understood of every text that is read."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Understood:
    """What was read of a source, as it becomes known: one line for people, `str` of it."""

    def __init__(self, source: Source) -> None:
        self.name = describe(source)
        self.shape: Shape | None = None
        self.documents = self.empty = self.tokens = 0
        self.in_template = False
        self.files: list[Path] = []
        self.left_out: list[str] = []

    def say(self, tokens: int) -> None:
        """Tell the listener, if there is one, when all is read."""
        self.tokens, listener = tokens, _listener.get()
        if listener is not None:
            listener(str(self))

    def __str__(self) -> str:
        said = [f"{self.documents:,} document{'s' * (self.documents != 1)}", f"{self.tokens:,} tokens"]
        if len(self.files) > 1:
            said.append(f"{len(self.files)} files")
        if self.shape is not None:
            said.append(f"{self.shape}{' in the chat template of the tokenizer' if self.in_template else ''}")
        if self.empty:
            said.append(f"{self.empty:,} without text left out")
        if self.left_out:
            said.append(f"{len(self.left_out)} other files left out ({', '.join(self.left_out[:3])})")
        return f"{self.name}: {', '.join(said)}"


def read_documents(
    source: Source, tokenizer: Any = None, answers_only: bool = False, understood: Understood | None = None
) -> Iterator[Document]:
    """The documents of a source; those of the exam and of the facts never end.

    Where a source names neither `field` nor `chat`, its records are told by their fields: text, messages, or questions
    with their answers, which become conversations if the tokenizer has a chat template. A record without a text (null)
    is an empty document.

    Args:
        tokenizer: has the chat template in which conversations are written; only conversations need it.
        answers_only: find the answers of every document: the letters of exam questions, what the assistant says in a
            conversation, the last of several fields. Of text that asks nothing everything counts.
        understood: is told what was read.

    Raises:
        ValueError: no such file, an unknown kind of file, a broken line, a missing field, a tokenizer without a chat
            template, a template whose answers cannot be found (all name the source).
    """
    understood = understood or Understood(source)
    if source.exam or source.facts:
        found = exam_documents(source.seed, answers_only) if source.exam else map(Document, facts(source.seed))
        found = islice(found, source.num_documents)
    else:
        if source.chat is not None and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"data: {describe(source)} asks for chat, and the model's tokenizer has no chat template; "
                "leave out chat and name the fields as field: a+b."
            )
        records = _hub_records(source) if source.hub is not None else _file_records(source, understood)
        found = _documents(source, tokenizer, records, answers_only, understood)
        found = islice(islice(found, source.skip_documents, None), source.num_documents)
    return _counted(found, understood)


def _counted(documents: Iterator[Document], understood: Understood) -> Iterator[Document]:
    for document in documents:
        understood.documents += bool(document.text)
        understood.empty += not document.text
        yield document


def exam_documents(seed: int, answers_only: bool) -> Iterator[Document]:
    for text in documents(seed):
        yield Document(text, tuple(m.span(1) for m in ANSWER.finditer(text)) if answers_only else None)


def _file_records(source: Source, understood: Understood) -> Iterator[Record]:
    understood.files, understood.left_out = files_of(Path(str(source.file)))
    for file in understood.files:
        yield from records_of(file, source.chat if isinstance(source.chat, str) else source.field)


def _hub_records(source: Source) -> Iterator[Record]:
    from datasets import load_dataset

    try:
        rows = load_dataset(str(source.hub), source.config, split=source.split)
    except Exception as error:  # the Hub client raises a dozen unrelated types; each means that nothing could be read
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"data: the dataset {source.hub!r} cannot be read from the Hub or its cache: {reason}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield Record(row, f"item {number} of {source.hub}")


def _documents(
    source: Source, tokenizer: Any, records: Iterator[Record], answers_only: bool, understood: Understood
) -> Iterator[Document]:
    template: Conversations | None = None
    has_template = getattr(tokenizer, "chat_template", None) is not None
    for item, place in records:
        if understood.shape is None:  # the first record says what the others are
            asked = source.chat if isinstance(source.chat, str) else None
            is_asked = source.chat is not None
            understood.shape = Shape(source.field, asked) if is_asked else shape_of(item, source.field)
        shape = understood.shape
        if shape is None:
            raise no_text(item, source.field, place)
        turns = source.chat if isinstance(source.chat, dict) else shape.turns if has_template else None
        if shape.chat is None and turns is None:
            yield _document_of(item, shape.field, place, answers_only)
            continue
        if not has_template:
            raise ValueError(
                f"data: {place} is a conversation ({shape}), and the model's tokenizer has no chat template to write "
                "it in; take the tokenizer of a chat model, or write the text into a field of its own and name that."
            )
        template, understood.in_template = template or Conversations(tokenizer), True
        yield _conversation(template, _messages(shape, turns, item, place), place, answers_only)


def _document_of(item: Any, field: str, place: str, answers_only: bool) -> Document:
    """One item; of several fields, joined by +, the last is the answer to the others."""
    text = _text_of(item, field, place)
    if not answers_only or isinstance(item, str) or "+" not in field:
        return Document(text)
    answer = _text_of(item, field.rpartition("+")[2], place)
    return Document(text, ((len(text) - len(answer), len(text)),) if answer else ())


def _text_of(item: Any, field: str, place: str) -> str:
    """The text of one item, stripped. A field may be several, joined by +, put together with an empty line between;
    one in brackets may be missing.
    """
    if isinstance(item, str):
        return cleaned(item)
    parts = []
    for name in field.split("+"):
        bare = name.strip("[]") if name.startswith("[") else name
        value = value_at(item, bare)
        if value is None and (has_field(item, bare) or bare != name):
            continue
        if not isinstance(value, str):
            raise no_text(item, bare, place)
        parts.append(cleaned(value))
    return "\n\n".join(part for part in parts if part)


def normalised(text: str) -> str:
    """Every end of a line as \\n, without byte order marks: those of files put together stand in the middle."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")


def cleaned(text: str) -> str:
    return normalised(text).strip()


def _messages(shape: Shape, turns: Mapping[Any, str] | None, item: Any, place: str) -> list[dict[str, Any]]:
    if turns is not None:
        said = [{"role": role, "content": _text_of(item, field, place)} for role, field in turns.items()]
        return [message for message in said if message["content"]]
    messages = messages_of(item, str(shape.chat), place)
    return [{**message, "content": normalised(message["content"])} for message in messages]


def _conversation(template: Conversations, messages: list[dict[str, Any]], place: str, answers_only: bool) -> Document:
    if not messages:
        return Document("")
    written, text = template.written(messages, place)
    answers = template.answers(written, text, place) if answers_only else None
    bos = template.tokenizer.bos_token or ""  # packing puts it there
    if bos and text.startswith(bos):
        text = text.removeprefix(bos)
        answers = None if answers is None else [(max(0, a - len(bos)), b - len(bos)) for a, b in answers]
    return Document(text, None if answers is None else tuple(answers))
