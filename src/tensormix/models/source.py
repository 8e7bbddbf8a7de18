"""Where a model comes from: opened once, and passed on to everything that reads it."""

# transformers and huggingface_hub say few of their types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tensormix.models.explained import explained
from tensormix.models.places import fetched, located, refuse_adapted
from tensormix.models.tokens import tokenizer_of
from tensormix.sites.quiet import quiet
from tensormix.storage.entries import Entry
from tensormix.storage.files import new_file, read_json
from tensormix.storage.formats import Format, files_beside, open_weights, weight_files
from tensormix.storage.gguf import Gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_KINDS = {"llama": ("llama", "mistral", "deci")}  # of the architectures of a GGUF file, those that share one name
_SAMPLES, _SAMPLE = 256, 1 << 18  # a fingerprint reads at most this many pieces of this many bytes of each file


class ModelSource:
    """A folder with config.json and weights, a Hub id, or one file of weights (or an index) beside its config.json.

    A GGUF file, alone in its folder or named, needs no config.json: then its config, its tokenizer and its chat
    template are those in the file, and nothing that lies beside it belongs to it.

    To open it reads config.json alone; everything else is read when it is first asked for, and only once.

    Attributes:
        location: the folder; a Hub id stays a string.
        file: the file of weights or the index that was named; None for a folder.

    Raises:
        ValueError: it is no model.
    """

    def __init__(self, id_or_path: str | Path) -> None:
        self.asked = id_or_path
        self.location, self.file = located(id_or_path)
        if isinstance(self.location, Path) and not self.is_alone:
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
        return self if isinstance(self.location, Path) else ModelSource(fetched(self.location))

    @property
    def is_alone(self) -> bool:
        """Whether it is a file that describes itself, with no config.json beside it."""
        is_described = self.file is not None and self.file.suffix == ".gguf"
        return is_described and not (Path(self.location) / "config.json").exists()

    @property
    def folder(self) -> Path:
        """The folder of `local`."""
        return Path(self.local.location)

    @cached_property
    def config(self) -> dict[str, Any]:  # whatever its architecture takes
        """What config.json says, or the file itself if it is alone."""
        if not self.local.is_alone:
            return read_json(self.folder / "config.json")
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

        described = dict(self.weights.described or {})
        return {"architectures": [names[described["model_type"]]], **described}

    def hf_config(self) -> PreTrainedConfig:
        """The same as an object of transformers, anew at each call. Raises ValueError if it cannot be one."""
        from transformers import AutoConfig

        if isinstance(self.location, str) and not self.location.endswith(".gguf"):
            try:
                with quiet(), explained(self.location):
                    return AutoConfig.from_pretrained(self.location, trust_remote_code=False)
            except ValueError:
                if not self.local.is_alone:  # as a repository of nothing but GGUF is
                    raise
        source = self.local
        described = source.config if source.is_alone else None
        with quiet(), explained(source.location):
            if described is not None:
                return AutoConfig.for_model(**described)
            return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)

    @property
    def has_weights(self) -> bool:
        """Whether there are files of weights; a folder with nothing but a config is enough to count."""
        return self.local.file is not None or bool(weight_files(self.folder))

    @cached_property
    def weights(self) -> Format:
        """All tensors, of which only the headers are read.

        Raises ValueError, naming the file, if one is damaged, or the tensor, if one is an adapter's.
        """
        weights = open_weights(self.folder, self.local.file)
        if weights.described is not None and not self.local.is_alone:
            beside, inside = self.config["model_type"], weights.described["model_type"]
            if beside.removesuffix("_text") not in _KINDS.get(inside, (inside.removesuffix("_text"),)):
                raise ValueError(
                    f"{self.folder / 'config.json'} describes a {beside}, and {weights.files[0].name} holds a "
                    f"{inside}: move one of them into a folder of its own"
                )
        if weights.described is None:
            refuse_adapted(weights.entries, self.folder)
        return weights

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
        if isinstance(folder, str) and folder.endswith(".gguf"):
            return self.local.tokenizer()
        if isinstance(folder, Path) and not self._has_tokenizer_beside():
            if self.has_weights and isinstance(self.weights, Gguf) and self.weights.has_tokenizer:
                return tokenizer_of(self.weights)
            what = folder if self.file is None else self.file
            raise ValueError(f"{what} has no tokenizer (no tokenizer.json); copy the one of the original model there")
        from transformers import AutoTokenizer

        try:
            with quiet(), explained(folder):
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ValueError:
            if isinstance(folder, Path) or not self.local.is_alone:  # as a repository of nothing but GGUF is
                raise
        return self.local.tokenizer()

    def _has_tokenizer_beside(self) -> bool:
        """Whether there are files of a tokenizer that belong to the model: of a file that was named none may."""
        folder = Path(self.location)
        there = any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists()
        return there and not (self.is_alone and Path(self.asked).is_file())

    def beside(self) -> list[Path]:
        """The files that belong to the model beside its weights and its config, and go where it goes."""
        return [] if self.local.is_alone else files_beside(self.folder)

    def write_beside(self, folder: Path, but: str | None = None) -> None:
        """Write what belongs to the model beside its weights and its config: copies, or what its one file holds.

        A file of the name `but` stays where it is.
        """
        for file in self.beside():
            if file.name != but:
                with file.open("rb") as old, new_file(folder / file.name) as copy:
                    shutil.copyfileobj(old, copy)
        weights = self.weights
        if not isinstance(weights, Gguf):
            return
        if not (folder / "generation_config.json").exists():
            from transformers import GenerationConfig

            tokens = {name: self.config.get(name) for name in ("bos_token_id", "pad_token_id")}
            GenerationConfig(**tokens, eos_token_id=weights.ends or None).save_pretrained(folder)
        if weights.has_tokenizer and not any(folder.glob("tokenizer*")):
            with quiet():
                self.tokenizer().save_pretrained(folder)

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
        for file in [*([] if self.is_alone else [self.location / "config.json"]), *files]:
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


def _check_config(path: Path) -> None:
    found = read_json(path)
    config = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    if "model_type" not in config:
        raise ValueError(f"{path} does not describe a transformers model: it has no model_type")
    if "auto_map" in config and not _known_type(str(config["model_type"])):
        raise ValueError(
            f"{path} asks for code of its own (model_type {config['model_type']!r}); "
            "tensormix never runs code from a checkpoint"
        )


def _known_type(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING
