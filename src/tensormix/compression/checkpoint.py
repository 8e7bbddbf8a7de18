"""Compress a checkpoint of any size: block by block from its files into a new checkpoint."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor

from tensormix.compression import Calibration, Progress, Stream, Walk, compress, named, streams_of
from tensormix.compression.choosing import Notes, chooses
from tensormix.compression.to_files import Disk
from tensormix.models import ModelSource, fill_buffers, load_model, quiet, skeleton
from tensormix.plan import Plan
from tensormix.rows import Row
from tensormix.sites.batches import batches_of
from tensormix.sites.calls import Activations
from tensormix.storage.files import whole_folder
from tensormix.storage.gguf import Gguf
from tensormix.storage.locks import only_writer
from tensormix.version import code_version


@torch.no_grad()
def compress_checkpoint(
    source: ModelSource | str | Path,
    out: Path,
    plan: Plan | Any,
    batches: Any = None,
    progress: Progress | None = None,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    inputs: Stream = "propagated",
    precision: torch.dtype = torch.float64,
    spill: bool = False,
    workers: int = 1,
    device: str = "cpu",
    asked: Any = None,
    overwrite: bool = False,
) -> list[Row]:
    """What `compress` does in memory, from the files of `source` into the new folder `out`: to the bit the same.

    At no time are more than `workers` dense blocks in memory, and of those only what is being computed with: weights
    are mapped from their files. Tensors that the plan leaves alone are copied byte for byte. A method that changes the
    whole model at once (slice_gpt) is the exception: the model is loaded, and an interrupted call begins again.

    Args:
        source: a folder with config.json and weights, a Hub id, one file of weights, or a source that is open.
        plan, batches, tokenizer, inputs, precision: as in `compress`.
        dtype: "auto" leaves every tensor in its own; another one converts those that the model knows.
        spill: keep the activations between blocks in files beside `out` instead of in memory.
        workers: blocks at a time, where no method needs inputs.
        device: where blocks are computed with.
        asked: what else tells this request from others, as JSON (the batches are not looked at): an interrupted walk
            that was asked for something else is started again, not continued.
        overwrite: what stands at `out` may be replaced.

    Returns:
        The rows of `compress`.

    Raises:
        ValueError: as `compress`, and if the checkpoint is damaged or incomplete, `out` exists or is being
            written by another process, or the disk is too small. What was finished before an error or a kill is used
            by the next call.
    """
    source, out, plan = ModelSource.of(source).local, Path(out).resolve(), Plan.of(plan)
    _check_request(source.folder, out, workers, inputs)
    if source.is_alone and isinstance(source.weights, Gguf) and source.weights.has_tokenizer:
        source.tokenizer()  # one that cannot be made is said now, not after hours
    with only_writer(out):
        if plan.whole is not None:
            _check_free(out, overwrite)
            return _in_memory(source, out, plan, batches, tokenizer, progress, dtype, inputs, precision, device)
        model: Any = skeleton(source, dtype=dtype)
        home = Disk(model, source, out, convert=dtype != "auto", device=device)
        calibration = Calibration(batches_of(model, batches, tokenizer), inputs, precision)
        with _room(home):
            names, notes = _named(model, plan, home, calibration, spill)
        walk = Walk(model, names, home, progress, notes)
        request = _request(source, plan, calibration, dtype, asked)
        if notes:
            request["blocks"] = [rule.blocks for rule in names.root]
        if home.is_complete(request):
            return home.all_rows()
        _check_free(out, overwrite)
        _prepare(walk, home, calibration, request, spill)
        _carry_out(walk, home, calibration, workers, source)
        return home.all_rows()


def _request(source: ModelSource, plan: Plan, calibration: Calibration, dtype: str, asked: Any) -> dict[str, Any]:
    """What tells one call from another, beside its batches."""
    return {
        "version": code_version(),
        "source": source.fingerprint,
        "dtype": dtype,
        "plan": plan.model_dump(mode="json"),
        "inputs": calibration.inputs,
        "precision": str(calibration.precision),
        "asked": asked,
    }


def _carry_out(walk: Walk, home: Disk, calibration: Calibration, workers: int, source: ModelSource) -> None:
    """The walk, and the end of the new checkpoint."""
    with _room(home):
        walk.run(calibration, workers)
        if source.has_changed():
            raise ValueError(
                f"{source.folder} changed while it was read: what was made of it is of no use; start again"
            )
        home.finish()


def _prepare(walk: Walk, home: Disk, calibration: Calibration, request: dict[str, Any], spill: bool) -> None:
    """Everything that is to be there before the first block: batches, buffers, room on the disk."""
    walk.check_inputs(calibration.batches)
    meanwhile = 0
    if walk.last_observed >= 0:
        batches = calibration.batches = list(calibration.batches or ())
        fill_buffers(walk.model, home.device)
        calibration.activations = Activations(home.part / "activations" if spill else None)
        meanwhile = _bytes_of_activations(walk, batches, calibration.inputs) if spill else 0
    home.begin(request, walk, meanwhile)


def _named(model: Any, plan: Plan, home: Disk, calibration: Calibration, spill: bool) -> tuple[Plan, Notes]:
    """`named`, with the activations in files for as long as it takes, if that is asked for."""
    if not chooses(plan):
        return plan, {}
    fill_buffers(model, home.device)
    if not spill:
        return named(model, plan, home, calibration)
    home.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{home.out.name}.", dir=home.out.parent) as folder:
        calibration.activations = Activations(Path(folder))
        return named(model, plan, home, calibration)


@contextmanager
def _room(home: Disk) -> Iterator[None]:
    """Say in a sentence that the disk is full, if it is."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"the disk under {home.out.parent} is full; make room and give the same command again: "
            f"it goes on after the {home.num_finished} files that are finished"
        ) from error


def _bytes_of_activations(walk: Walk, batches: list[Tensor], inputs: Stream) -> int:
    """What is on the disk at once: one list of hidden states for each stream."""
    model: Any = walk.model
    num_numbers = sum(batch.numel() for batch in batches) * model.config.get_text_config().hidden_size
    return len(streams_of(walk.units, inputs)) * num_numbers * model.dtype.itemsize


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; choose another folder, or say that it may be overwritten")


def _in_memory(
    source: ModelSource,
    out: Path,
    plan: Plan,
    batches: Any,
    tokenizer: Any,
    progress: Progress | None,
    dtype: str,
    inputs: Stream,
    precision: torch.dtype,
    device: str,
) -> list[Row]:
    """For a method that changes all blocks at once: the whole model is loaded, and nothing is continued."""
    model: Any = load_model(source, dtype=dtype)
    model.to(device)
    rows = compress(model, plan, batches, progress, tokenizer=tokenizer, inputs=inputs, precision=precision)
    with whole_folder(out) as part, quiet():
        source.write_beside(part)
        model.save_pretrained(part)
    return rows


def _check_request(folder: Path, out: Path, workers: int, inputs: str) -> None:
    if folder.resolve().is_relative_to(out):
        raise ValueError(f"{out} holds the model that is to be compressed ({folder}); choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the compressed checkpoint is a folder")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if inputs not in get_args(Stream):
        raise ValueError(f"inputs must be {' or '.join(map(repr, get_args(Stream)))}, got {inputs!r}")
