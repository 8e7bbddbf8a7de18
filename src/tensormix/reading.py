"""YAML files read with care: paths in them are taken from their folder, and what is wrong is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tensormix.explain import explain

Model = TypeVar("Model", bound=BaseModel)


FILES = ("file", "examples")  # keys of paths that are taken from the recipe's folder


def validated(cls: type[Model], data: Any, where: str) -> Model:
    """The settings that `data` are. Raises ValueError in one sentence, which begins with `where`, if they are none."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, cls, data, where)) from None


def placed_path(path: str, folder: Path) -> str:
    """A relative path taken from `folder`; ~ is the user's home."""
    return str(folder.resolve() / Path(path).expanduser())


def is_path(model: str, folder: Path) -> bool:
    """Whether the name of a model is a folder there, and no Hub id."""
    return model.startswith((".", "~")) or (folder / model).exists()


def placed_files(data: Any, folder: Path) -> Any:
    """The same data with the paths of all files in it taken from `folder`."""
    if isinstance(data, dict):
        return {
            key: placed_path(value, folder) if key in FILES and isinstance(value, str) else placed_files(value, folder)
            for key, value in data.items()
        }
    return [placed_files(item, folder) for item in data] if isinstance(data, list) else data


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file holds. Raises ValueError if it is missing, is no YAML or no mapping."""
    data = read_any_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(data).__name__}")
    return data


def read_any_yaml(path: Path) -> Any:
    """What a YAML file holds, if only a list. Raises ValueError if it is missing or is no YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
