"""Files that are whole or absent, and the facts about the machine that every result carries."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

RECORDED_PACKAGES = ("tensormix", "torch", "transformers", "accelerate", "safetensors", "datasets")
UNFINISHED = ".unfinished"  # how the names of files and folders end while they are written


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that stands at `path` whole or not at all: under another name, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path)
    try:
        with part.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        put_in_place(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with new_file(path) as handle:
        handle.write(text.encode())


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises:
    ValueError: the file is not JSON; the sentence names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it to have it made again.") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error; what stood there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path)
    part.mkdir()
    try:
        yield part
        for file in (part, *part.rglob("*")):
            _sync(file)
        shutil.rmtree(path, ignore_errors=True)
        put_in_place(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def unfinished(path: Path) -> Path:
    """A name beside `path` that no other process and no other write of this one uses."""
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}{UNFINISHED}")


def put_in_place(part: Path, path: Path) -> None:
    """Rename, and return when the new name is on the disk."""
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of `name` in `folder`. Whoever calls it holds the lock of what it names."""
    for left in folder.glob(f".{name}.{'[0-9a-f]' * 12}{UNFINISHED}"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def content_digest(path: Path) -> str | None:
    """A hash of what a file holds, or all files of a folder; None where there is nothing.

    A file that did not change is read once a process.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        held = "".join(f"{file.relative_to(path)} {content_digest(file)}\n" for file in files)
        return hashlib.sha256(held.encode()).hexdigest()
    try:
        known = path.stat()
    except OSError:
        return None
    return _digest(path.resolve(), known.st_size, known.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+changes" if it was edited; None outside git."""
    here = Path(__file__).parents[1]  # the package

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", __file__) is None:  # installed into someone else's checkout
        return None
    commit = ask("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+changes" if ask("status", "--porcelain", "--", str(here)) else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def environment() -> dict[str, Any]:
    """Versions, commit and hardware: what a number needs beside it to be measured again."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        "commit": _commit(),
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "system": platform.platform(),
    }
