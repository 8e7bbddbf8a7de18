"""What a record holds: a text, a conversation, or a question with its answer; told by the names of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

# Fields in which people keep conversations, and questions with their answers; those in brackets may be missing.
TALKS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "[input]", "output"),
    ("instruction", "[context]", "response"), ("question", "answer"),
)  # fmt: skip


class Shape(NamedTuple):
    """Where the text of records is: in one field or several (`field`), or in messages (`chat`)."""

    field: str = "text"  # several joined by +, the last of which answers the others
    chat: str | None = None  # the field of the messages; "" if the record itself is their list
    turns: dict[str, str] | None = None  # the fields of each role, of a question and its answer

    def __str__(self) -> str:
        if self.chat is not None:
            return f"conversations in the field {self.chat!r}" if self.chat else "conversations"
        fields = [name.strip("[]") for name in self.field.split("+")]
        return f"the field{'s' * (len(fields) > 1)} {' + '.join(map(repr, fields))}"


def shape_of(item: Any, field: str = "text") -> Shape | None:
    """What a record holds whose field is `field`; of the default, "text", other fields are tried. None: nothing."""
    if isinstance(item, str):
        return Shape(field)
    if is_talk(item):
        return Shape(field, chat="")
    if not isinstance(item, dict):
        return None
    if field != "text" or value_at(item, field) is not None:
        return Shape(field, chat=field if is_talk(value_at(item, field)) else None)
    for name in TALKS:
        if is_talk(item.get(name)):
            return Shape(field, chat=name)
    if is_talk(item.get("prompt")) and is_talk(item.get("completion")):
        return Shape(field, chat="prompt+completion")
    for names in PAIRS:
        if all(isinstance(item.get(name.strip("[]"), ""), str | None) for name in names):
            needed = [name for name in names if not name.startswith("[")]
            if all(isinstance(item.get(name), str) for name in needed):
                turns = {"user": "+".join(names[:-1]), "assistant": names[-1]}
                return Shape("+".join(names), turns=turns)
    return Shape(field) if has_field(item, field) else None


def is_talk(value: Any) -> bool:
    """Whether a value is a list of messages, by role and content or in the words of ShareGPT, from and value."""
    if isinstance(value, dict):  # columns of roles and contents, as tables keep a list of objects
        return all(isinstance(value.get(key), list) for key in ("role", "content"))
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and _speaks(m) for m in value)


def _speaks(message: Mapping[str, Any]) -> bool:
    return ("role" in message and ("content" in message or "tool_calls" in message)) or {"from", "value"} <= set(
        message
    )


def value_at(item: Any, field: str) -> Any:
    """The value of a field: of that very name, or by names and numbers with dots between. None where there is none."""
    if isinstance(item, dict) and field in item:
        return item[field]
    for name in field.split("."):
        if isinstance(item, dict):
            item = item.get(name)
        elif isinstance(item, list) and name.isdigit() and int(name) < len(item):
            item = item[int(name)]
        else:
            return None
    return item


def has_field(item: Any, field: str) -> bool:
    """Whether a record has a field, if only an empty one."""
    if isinstance(item, dict) and field in item:
        return True
    parent, _, name = field.rpartition(".")
    holder = value_at(item, parent) if parent else item
    return (isinstance(holder, dict) and name in holder) or value_at(item, field) is not None


def no_text(item: Any, field: str, place: str) -> ValueError:
    """The sentence about a record that has no text in `field`: what it has, and the nearest right thing."""
    if not isinstance(item, dict):
        return ValueError(f"data: {place} has no text field {field!r}; it is {kind_name(item)}.")
    there = ", ".join(map(str, item)) or "nothing"
    if has_field(item, field):
        return ValueError(f"data: the field {field!r} of {place} holds {kind_name(value_at(item, field))}, not text.")
    texts = [name for name in paths_of(item)]
    near = get_close_matches(field, texts, n=1) or texts[:1]
    hint = f"; write field: {near[0]}" if near else ""
    return ValueError(f"data: {place} has no text field {field!r}; it has: {there}{hint}.")


def paths_of(item: Mapping[str, Any], before: str = "") -> list[str]:
    """The fields that hold text, those of nested objects with dots."""
    found = []
    for name, value in item.items():
        if isinstance(value, str):
            found.append(f"{before}{name}")
        elif isinstance(value, dict):
            found += paths_of(value, f"{before}{name}.")
    return found


def kind_name(value: Any) -> str:
    """What a value is, in a word."""
    if is_talk(value):
        return "a list of messages (write chat: and the name of that field)"
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)
