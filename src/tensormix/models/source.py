"""Where a model comes from: opened once, and passed on to everything that reads it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensormix.models.explained import explained
from tensormix.sites.quiet import quiet
from tensormix.storage.entries import Entry
from tensormix.storage.files import read_json
from tensormix.storage.formats import FORMATS, Format, format_of, open_weights, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES, _SAMPLE = 256, 1 << 18  # a fingerprint reads at most this many pieces of this many bytes of each file
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelSource:
    """A folder with config.json and weights, a Hub id, or one file of weights (or an index) beside its config.json.

    To open it reads config.json alone; everything else is read when it is first asked for, and only once.

    Attributes:
        location: the folder; a Hub id stays a string.
        file: the file of weights or the index that was named; None for a folder.

    Raises:
        ValueError: it is no model.
    """

    def __init__(self, id_or_path: str | Path) -> None:
        self.asked = id_or_path
        self.location, self.file = _located(id_or_path)
        if isinstance(self.location, Path):
            if not (self.location / "config.json").exists():
                beside = "is not a model folder: it" if self.file is None else f"holds {self.file.name}, but"
                raise ValueError(f"{self.location} {beside} has no config.json")
            _check_config(self.location / "config.json")

    @classmethod
    def of(cls, source: ModelSource | str | Path) -> ModelSource:
        """The source itself, or the one at a path or Hub id."""
        return source if isinstance(source, ModelSource) else cls(source)

    def __str__(self) -> str:
        return str(self.asked)

    @cached_property
    def local(self) -> ModelSource:
        """The source itself; of a Hub id the snapshot in the local cache, fetched first where it is missing.

        Raises ValueError if it cannot be reached, or is no model.
        """
        if isinstance(self.location, Path):
            return self
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
        wanted += [pattern for one in FORMATS.values() for pattern in one.file_patterns]
        with quiet(), explained(self.location):
            folder = Path(snapshot_download(self.location, allow_patterns=wanted))
        return ModelSource(folder)

    @property
    def folder(self) -> Path:
        """The folder of `local`."""
        return Path(self.local.location)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return read_json(self.folder / "config.json")

    @property
    def has_weights(self) -> bool:
        """Whether there are files of weights; a folder with nothing but a config is enough to count."""
        return self.file is not None or bool(weight_files(self.folder))

    @cached_property
    def weights(self) -> Format:
        """All tensors, of which only the headers are read. Raises ValueError, naming the file, if one is damaged."""
        return open_weights(self.folder, self.local.file)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Where every tensor lies, by name."""
        return self.weights.entries

    @property
    def stored_bits(self) -> int | None:
        """What all tensors take in their files; None without weights."""
        return sum(map(self.weights.bits, self.entries.values())) if self.has_weights else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one in the folder or repository, anew at each call: a tokenizer keeps, and saves, how it was used last.

        Raises ValueError if there is none, or it is out of reach.
        """
        folder = self.location
        if isinstance(folder, Path) and not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").exists():
            raise ValueError(f"{folder} has no tokenizer (no tokenizer.json); copy the one of the original model there")
        from transformers import AutoTokenizer

        with quiet(), explained(folder):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash that differs for another model: of its config, and of every weights file the size, the header
        and evenly spread samples (all of a small file). Of a Hub id it is the id.

        It is that of the files when it was first asked for; see `has_changed`.
        """
        if isinstance(self.location, str):
            return f"hub:{self.location}"
        digest = hashlib.blake2b(digest_size=8)
        files = weight_files(self.location) if self.file is None else self.weights.files
        for file in [self.location / "config.json", *files]:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as handle:
                if size <= _SAMPLES * _SAMPLE:
                    digest.update(handle.read())
                else:
                    for number in range(_SAMPLES):
                        handle.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
                        digest.update(handle.read(_SAMPLE))
        return digest.hexdigest()

    def has_changed(self) -> bool:
        """Whether its files are others now than when `fingerprint` was first asked for; they are read again."""
        return ModelSource(self.asked).fingerprint != self.fingerprint


class Sources:
    """The dense models of one command by path or Hub id, each opened when it is first asked for.

    Not for models that the command writes itself: their files change.
    """

    def __init__(self) -> None:
        self._open: dict[str, ModelSource] = {}

    def __getitem__(self, id_or_path: str) -> ModelSource:
        if id_or_path not in self._open:
            self._open[id_or_path] = ModelSource(id_or_path)
        return self._open[id_or_path]


def local_folder(source: ModelSource | str | Path) -> Path:
    """The folder itself; of a Hub id the snapshot in the local cache, fetched first where it is missing.

    Raises ValueError if it is no model or cannot be reached.
    """
    return ModelSource.of(source).folder


def fingerprint(source: ModelSource | str | Path) -> str:
    """A short hash that changes when the model in a folder does, see `ModelSource`; of a Hub id it is the id.

    Raises ValueError if it is no model.
    """
    return ModelSource.of(source).fingerprint


def _located(id_or_path: str | Path) -> tuple[Path | str, Path | None]:
    """The folder and the file in it that was named, or a Hub id."""
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        return path, None
    if path.exists():
        if format_of(path) is None:
            raise ValueError(
                f"{path} is a file of no format that weights are read from; a model is a folder with config.json and "
                "safetensors, one such file beside its config.json, or a Hub id"
            )
        return path.parent, path
    text = str(id_or_path)
    if isinstance(id_or_path, Path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise ValueError(f"{text} is neither a folder or file that exists nor a Hub id such as 'owner/name'")
    return text, None


def _check_config(path: Path) -> None:
    config = read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} does not describe a transformers model: it has no model_type")
    if "auto_map" in config and not _known_type(config["model_type"]):
        raise ValueError(
            f"{path} asks for code of its own (model_type {config['model_type']!r}); "
            "tensormix never runs code from a checkpoint"
        )


def _known_type(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING
