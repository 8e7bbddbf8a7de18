"""What pydantic found wrong, as one sentence: where, what, and the nearest right thing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, RootModel, ValidationError


def explain(error: ValidationError, cls: type[BaseModel], data: Any, where: str) -> str:
    """The most telling of the errors that validating `data` as `cls` gave, with a count of the others.

    For an unknown key it reads "recipe.plan[0].method: unknown key 'num_branch', did you mean 'num_branches'?
    Known: ...".
    """
    errors = error.errors(include_url=False)
    # pydantic also calls a list too short whose only item is wrong
    errors = [item for item in errors if not (item["type"] == "too_short" and item["input"])]
    found = min(errors, key=lambda item: item["type"] != "extra_forbidden")  # a typo often explains the rest
    keys, model = _walk(cls, data, found["loc"])
    path = where + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    sentence = _sentence(found, path, model)
    others = len(errors) - 1
    return sentence + (f" ({others} more {'error' if others == 1 else 'errors'}.)" if others else "")


def _sentence(found: Any, path: str, model: type[BaseModel] | None) -> str:
    parent, _, key = path.rpartition(".")
    match found["type"]:
        case "extra_forbidden":
            return f"{parent}: unknown key {key!r}{_known(key, model.model_fields if model else ())}"
        case "missing":
            return f"{parent}: missing {key!r}. Known: {', '.join(model.model_fields) if model else key}."
        case "union_tag_invalid":
            context = found["ctx"]
            known = [name.strip().strip("'") for name in str(context["expected_tags"]).split(",")]
            name = context["discriminator"].strip("'")
            return f"{path}: unknown {name} {context['tag']!r}{_known(str(context['tag']), known)}"
        case "union_tag_not_found":
            name = found["ctx"]["discriminator"].strip("'")
            return f"{path}: missing {name!r}, which says which one is meant"
        case "literal_error":
            near = difflib.get_close_matches(
                str(found["input"]), re.findall("'([^']*)'", found["ctx"]["expected"]), n=1
            )
            hint = f", did you mean {near[0]!r}?" if near else "."
            return f"{path}: must be {found['ctx']['expected']}, got {found['input']!r}{hint}"
        case "tuple_type" | "list_type":
            return f"{path}: must be a list, got {found['input']!r}."
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{path}: must be keys and values, got {found['input']!r}."
        case "value_error":
            return _ended(f"{path}: {found['ctx']['error']}")
    return _ended(f"{path}: {_lower(found['msg'])}, got {found['input']!r}")


def _walk(cls: type[BaseModel], data: Any, loc: Sequence[int | str]) -> tuple[list[int | str], type[BaseModel] | None]:
    """The keys of `loc` that are in the data (pydantic adds the branch of a union), and the model of the last one."""
    keys: list[int | str] = []
    model: type[BaseModel] | None = cls
    annotation: Any = cls
    if loc and loc[-1] == "[key]":  # what is wrong is the key of a mapping itself
        loc = loc[:-2]
    for position, key in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(key, int) and isinstance(data, list | tuple) and key < len(data):
            data = data[key]
        elif isinstance(key, str) and (last or (isinstance(data, dict) and key in data)):
            model = _branch(annotation, data)
            if model is not None and key in model.model_fields:
                annotation = model.model_fields[key].annotation
            data = data.get(key) if isinstance(data, dict) else None
        else:
            continue
        keys.append(key)
    return keys, model


def _branch(annotation: Any, data: Any) -> type[BaseModel] | None:
    """The model inside an annotation; where there are several, the one whose `name` the data gives."""
    models = list(_models(annotation))
    name = data.get("name") if isinstance(data, dict) else None
    named = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == name]
    return (named or models or [None])[0]


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        yield from _models(annotation.model_fields["root"].annotation)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _known(key: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    return (f", did you mean {near[0]!r}?" if near else ".") + f" Known: {', '.join(known)}."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."
