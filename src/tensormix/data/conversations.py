"""Conversations in the words of a tokenizer's chat template, and what of them the assistant says.

A chat template is a program: it may trim a message, leave out the reasoning of earlier turns, or write the last turn
unlike the others. So no part of a conversation is rendered by itself. What a template marks with {% generation %} is
what the assistant says. Of any other template a message is found by asking twice: the conversation is written again
with one mark in the place of what that message says, and where the two texts differ is what the message says, with its
reasoning and tool calls if it has any.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
WORD = re.compile(r"[A-Za-z0-9]+")
WRITTEN = ("system", "user", "assistant")  # the roles that every template knows, or refuses by itself
MARKS = [chr(code) for code in range(0xE000, 0xE100)]  # of Unicode's private use: texts are not written in them

Message = dict[str, Any]
Span = tuple[int, int]  # first and last + 1 of some characters


class Conversations:
    """Writes messages with the chat template of a tokenizer, which must have one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.marked = GENERATION.search(tokenizer.get_chat_template()) is not None
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first) or r"(?!)")
        self.takes_parts: bool | None = None  # whether content is a list of parts; known when something was said
        self.end: str | None = None  # what ends a turn of the assistant; known when one was seen

    def write(self, messages: Sequence[Message], name: str) -> str:
        """The text of a conversation. Raises ValueError, with its `name`, if the template refuses it."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs, and raise what they like
            raise ValueError(
                f"data: {name} does not fit the tokenizer's chat template: {_first_line(error)}"
            ) from error

    def written(self, messages: Sequence[Message], name: str) -> tuple[Sequence[Message], str]:
        """The messages in the form in which the template takes them, and the text of the conversation.

        Templates of models that see images know only lists of parts, and write nothing of a plain text.

        Raises:
            ValueError: as `write`, and if the template leaves out a message whose role it does not know, or tool calls.
        """
        said = [message for message in messages if message["content"].strip()]
        if self.takes_parts is None and said:
            plain = self._tried(messages)
            parts = None if plain is not None and _says(plain, said[0]) else self._tried(_in_parts(messages))
            self.takes_parts = parts is not None and _says(parts, said[0])
        messages = _in_parts(messages) if self.takes_parts else messages
        text = self.write(messages, name)
        for number, message in enumerate(messages, 1):
            role, calls = message["role"], message.get("tool_calls") or ()
            if role not in WRITTEN and not _says(text, message):
                raise ValueError(
                    f"data: message {number} of {name} has the role {role!r}, which the tokenizer's chat template does "
                    f"not write; known to every template: {', '.join(WRITTEN)}."
                )
            named = [call["function"].get("name") for call in calls if isinstance(call.get("function"), dict)]
            if any(str(tool) not in text for tool in named):
                raise ValueError(
                    f"data: message {number} of {name} calls tools ({', '.join(map(str, named))}), which the "
                    "tokenizer's chat template does not write; leave such conversations out of the file."
                )
        return messages, text

    def _tried(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # said by `write`, if the other form does no better
            return None

    def answers(self, messages: Sequence[Message], text: str, name: str) -> list[Span]:
        """Where in `text`, the conversation as it was written, the assistant speaks: each span is what one message
        says and what ends the turn after it, so that whoever learns from it learns to stop.

        Raises:
            ValueError: it cannot be told from the template.
        """
        said = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not said:
            return []
        if self.end is None:
            self.end = self._end_of_turn(messages[: said[0]], name)
        spans = self._generated(messages) if self.marked else [self._said(messages, i, text, name) for i in said]
        spans = [(first, self._with_end(text, first, last)) for first, last in spans if first < last]
        if any(one[1] > other[0] for one, other in pairwise(spans)):
            raise _hidden(name, "it writes the messages in another order")
        return spans

    def _generated(self, messages: Sequence[Message]) -> list[Span]:
        """What the template marks. Of transformers only the characters are taken: its mask of tokens runs on to the
        end of the text where the last character of a span belongs to no token, or to the very first one.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        written: Any = render_jinja_template(
            conversations=[plain],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return written[1][0]

    def _said(self, messages: Sequence[Message], place: int, text: str, name: str) -> Span:
        """What depends on one message. (0, 0) if the template writes nothing of it."""
        mark = next((mark for mark in MARKS if mark not in text), MARKS[0])
        marked = self._marked([*messages[:place], self._saying(mark), *messages[place + 1 :]], place, name)
        if marked == text:
            return 0, 0
        before, found, after = marked.partition(mark)
        if not found or mark in after:
            raise _hidden(name, f"it does not write message {place + 1} once and as it is")
        first = _common(text, before)
        return first, max(first, len(text) - _common(text[::-1], after[::-1]))

    def _end_of_turn(self, before: Sequence[Message], name: str) -> str:
        """What the template writes behind the last message of the assistant: as far as the first special token, or all
        of it but the white space at its end, unless it is nothing else.
        """
        _, _, after = self._marked([*before, self._saying(MARKS[0])], len(before), name).rpartition(MARKS[0])
        special = self.special.search(after)
        return after[: special.end()] if special else after.rstrip() or after

    def _with_end(self, text: str, first: int, last: int) -> int:
        """The end of a turn that ends in `text` at `last`; some templates let the next speaker's token end it."""
        if self.end and text.startswith(self.end, last):
            return last + len(self.end)
        if self.marked and self.end and text[first:last].rstrip().endswith(self.end):
            return last  # the end is marked with what was said; what follows is the next speaker's
        special = self.special.match(text, last)
        return special.end() if special else last

    def _saying(self, content: str) -> Message:
        message = {"role": "assistant", "content": content}
        return _in_parts([message])[0] if self.takes_parts else message

    def _marked(self, messages: Sequence[Message], place: int, name: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:
            raise _hidden(name, f"it refuses another message {place + 1}: {_first_line(error)}") from error


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _says(text: str, message: Message) -> bool:
    """Whether all words of a message stand in a text, however it is quoted there."""
    content = message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]
    return content.strip() in text or all(word in text for word in WORD.findall(content))


def _hidden(name: str, reason: str) -> ValueError:
    return ValueError(
        f"data: {name}: what the assistant says cannot be told from the tokenizer's chat template ({reason}); take "
        "loss_on: all, or a template that marks it with {% generation %}."
    )


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if one.startswith(other):
        return len(other)
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
