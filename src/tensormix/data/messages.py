"""Messages as people keep them, in the one form that chat templates know: role, content and tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tensormix.data.shapes import is_talk, kind_name, value_at

Message = dict[str, Any]
# The speakers of ShareGPT, and of earlier forms of other interfaces, as chat templates call them.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")


def messages_of(item: Any, chat: str, place: str) -> list[Message]:
    """The messages in the field `chat` of a record; of several fields, joined by +, one after another.

    Raises:
        ValueError: the field holds no list of messages, or one of them holds something other than text.
    """
    found: list[Message] = []
    for field in chat.split("+"):
        value: Any = value_at(item, field) if field else item
        if value == [] or (value is None and isinstance(item, dict) and field in item):
            continue
        if not is_talk(value):
            there = ", ".join(map(str, item)) if isinstance(item, dict) else kind_name(item)
            raise ValueError(
                f"data: {place} has no list of messages {field!r}; each message is an object with role and content (or "
                f"from and value); the record has: {there}."
            )
        found += _rows(value) if isinstance(value, dict) else list(value or ())
    return [_plain(message, f"message {number} of {place}") for number, message in enumerate(found, 1)]


def _rows(columns: Mapping[str, Any]) -> list[Message]:
    return [{"role": role, "content": said} for role, said in zip(columns["role"], columns["content"], strict=False)]


def _plain(message: Mapping[str, Any], place: str) -> Message:
    """One message: its role by its usual name, its content as text, an empty one where there is none."""
    own = "role" in message
    role, content = (message["role"], message.get("content")) if own else (message["from"], message["value"])
    if not isinstance(role, str):
        raise ValueError(f"data: the role of {place} is {kind_name(role)}, not a name such as user or assistant.")
    # Names that only ShareGPT uses; of role and content some templates know "model" themselves.
    named = {"function": "tool"}.get(role, role) if own else ROLES.get(role, role)
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "from", "value")}
    calls = rest.pop("tool_calls", None)
    call = rest.pop("function_call", None)
    if not calls and call:
        calls = [{"type": "function", "function": call}]
    if not own and role == "function_call":
        calls, content = [{"type": "function", "function": _decoded(content)}], ""
    plain = {"role": named, "content": _text(content, place), **rest}
    return plain | {"tool_calls": [_with_arguments(one) for one in calls]} if calls else plain


def _text(content: Any, place: str) -> str:
    """The text of a message, its parts put together as chat templates do."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"data: the content of {place} is {kind_name(content)}, not text.")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise ValueError(
                f"data: {place} holds a part of the kind {kind!r}, and only text can be read; leave such conversations "
                "out of the file."
            )
        texts.append(text)
    return "".join(texts)


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object: templates write them as JSON, of a string they would quote it."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        return {**call, "function": {**function, "arguments": _decoded(function["arguments"])}}
    return call


def _decoded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
