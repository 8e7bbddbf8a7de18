"""One lock for everything that two processes could write at once: a run's folder, a new checkpoint, a file of a cache.

The lock lies in a small file that stays, and is held by a living process alone: it ends with that process, however
that ends.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # in the folder that it is for


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """While open, no other process writes into `folder`, which is made where it is missing.

    Raises ValueError if one does already.
    """
    with _held(folder / LOCK, f"{folder} is being written by another process; wait for it, or choose another folder"):
        yield


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """The same about one file or folder; the lock lies beside it."""
    with _held(beside(path), f"{path} is being written by another process; wait for it, or choose another folder"):
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """While open, no other process writes the file at `path`; waits for one that does, and says so once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(beside(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger(__name__).warning("waiting for another process, which is writing %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _held(path: Path, refusal: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(refusal) from None
    try:
        yield
    finally:
        lock.release()
