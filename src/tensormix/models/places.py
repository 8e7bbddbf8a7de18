"""Where the files of a model are: a folder, a cache of the Hub, one file, a Hub id; and what is no model at all."""

# transformers and huggingface_hub say few of their types.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from tensormix.models.explained import explained
from tensormix.sites.quiet import quiet
from tensormix.storage.files import read_json
from tensormix.storage.formats import FORMATS, format_of, weight_files
from tensormix.storage.gguf import only_model

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/(.+\.gguf)")
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")


def located(id_or_path: str | Path) -> tuple[Path | str, Path | None]:
    """The folder and the file in it that was named or is the model; of a Hub id the id itself.

    Raises ValueError if there is neither, or what is there is no model.
    """
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        folder = _snapshot(path)
        refuse_adapter(folder)
        return folder, described_file(folder)
    if path.exists():
        if format_of(path) is None:
            raise ValueError(
                f"{path} is a file of no format that weights are read from; a model is a folder with config.json and "
                "safetensors, one such file beside its config.json, a GGUF file, or a Hub id"
            )
        refuse_adapter(path.parent, path)
        return path.parent, path
    text = str(id_or_path)
    if isinstance(id_or_path, str) and (match := _HUB_FILE.fullmatch(text)) and not text.startswith("."):
        return f"{match[1]}/{match[2]}", None
    if isinstance(id_or_path, Path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise ValueError(f"{text} is neither a folder or file that exists nor a Hub id such as 'owner/name'")
    return text, None


def _snapshot(folder: Path) -> Path:
    """Of the Hub's cache of one repository the files of its newest revision; else the folder itself."""
    snapshots = folder / "snapshots"
    if (folder / "config.json").exists() or not snapshots.is_dir():
        return folder
    revisions = sorted(one for one in snapshots.iterdir() if one.is_dir())
    main = folder / "refs" / "main"
    if main.exists() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    if len(revisions) != 1:
        names = ", ".join(one.name for one in revisions[:4]) or "no revision"
        raise ValueError(
            f"{folder} is a cache of the Hub with {names} in it; name the one that is meant: {snapshots}/REVISION"
        )
    return revisions[0]


def described_file(folder: Path) -> Path | None:
    """The file that is the model, of a folder whose only weights are in one that describes itself."""
    files = weight_files(folder)
    if files and all(file.suffix == ".gguf" for file in files):
        return only_model(folder)
    return None


def refuse_adapter(folder: Path, file: Path | None = None) -> None:
    """Raise ValueError if a folder holds an adapter, alone or beside a model: transformers would load both together.

    A GGUF file that was named is a model of its own, whatever lies beside it.
    """
    found = [name for name in _ADAPTERS if (folder / name).exists()]
    if not found or (file is not None and file.suffix == ".gguf"):
        return
    config = read_json(folder / _ADAPTERS[0]) if _ADAPTERS[0] in found else None
    base = cast("dict[str, object]", config).get("base_model_name_or_path") if isinstance(config, dict) else None
    of = f" of {base}" if base else ""
    how = "merge it first: PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(new_folder)"
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds an adapter{of} beside the model ({found[0]}): {how}, or take it out of there")
    raise ValueError(f"{folder} holds an adapter{of} ({found[0]}), not a model: {how}")


def refuse_adapted(names: Iterable[str], folder: Path) -> None:
    """Raise ValueError if tensors by these names are those of a model that adapters are wrapped around."""
    for name in names:
        if ".lora_A." in name or ".base_layer." in name or name.startswith("base_model.model."):
            raise ValueError(
                f"{folder} holds {name}: the weights were saved with an adapter around them; merge it first: "
                "model.merge_and_unload().save_pretrained(new_folder)"
            )


def fetched(location: str) -> Path:
    """The folder of a Hub id in the local cache, or the GGUF file that was named or is all that the repository holds.

    It is fetched first where it is missing. Raises ValueError if it is out of reach, or several files could be meant.
    """
    import huggingface_hub as hub

    match = _HUB_FILE.fullmatch(location)
    with quiet(), explained(location):
        if match is not None:
            return Path(hub.hf_hub_download(match[1], match[2]))
        plain = [one for name, one in FORMATS.items() if name != "gguf"]
        wanted = [pattern for one in plain for pattern in (*one.file_patterns, *one.index_patterns)]
        folder = Path(hub.snapshot_download(location, allow_patterns=[*_BESIDE, *wanted]))
    if any(file.suffix != ".gguf" for file in weight_files(folder)):
        return folder
    # A repository of GGUF holds its model many times, one file for each way of rounding: not all are fetched.
    files = _gguf_files(location, folder)
    if len(files) > 1:
        raise ValueError(
            f"{location} holds several models as GGUF ({', '.join(files[:8])}); name the file: {location}/NAME"
        )
    with quiet(), explained(location):
        return Path(hub.hf_hub_download(location, files[0])) if files else folder


def _gguf_files(location: str, folder: Path) -> list[str]:
    """The models in a repository by the names of their files; those in the cache where the Hub is out of reach."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(location)
    except Exception:  # offline, unknown, forbidden: what is in the cache is all there is
        names = [file.name for file in folder.glob("*.gguf")]
    return sorted(name for name in names if name.endswith(".gguf") and "mmproj" not in name)
