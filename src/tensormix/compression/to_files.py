"""Blocks that come from the files of one checkpoint and go, compressed, into the files of another.

    out/                  the compressed checkpoint; it appears when it is complete
    .out.part/            while it is being made: one finished file per block
    out.journal.jsonl     what was asked, then one line per finished file: its hash, its size, the rows of its sites

Every file is complete or absent, and a line of the journal is written after the file that it is about. So a walk that
was stopped at any moment goes on at the first unfinished block, and ends with the same files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tensormix.compression import Walk
from tensormix.compression.from_files import Source, inside
from tensormix.hf import attach, fitted_blocks, install_empty, operators_of
from tensormix.models import ModelSource
from tensormix.operators import Owner, StandIn, outermost
from tensormix.rows import Row
from tensormix.sites import Site
from tensormix.sites.installing import mark_replacement, owners_closed_by
from tensormix.storage.assembly import Assembly, Making, packed_config
from tensormix.storage.entries import Entry, Piece
from tensormix.storage.files import put_in_place, write_json
from tensormix.storage.formats import passed_on
from tensormix.storage.journal import Journal, Line
from tensormix.storage.memory import check_space, set_weight
from tensormix.storage.safetensors import file_hash, read_header, write_index, write_shard


class Disk(Source):
    """The home of the blocks of `model` (a skeleton on meta) that go from the files of `origin` into new ones.

    Args:
        origin: the model that is compressed, with its files on this machine.
        out: the folder of the compressed checkpoint.
        convert: write the tensors that the model knows in the dtype of the skeleton, where theirs is another.
        device: where the weights of an entered block are.
    """

    def __init__(self, model: Any, origin: ModelSource, out: Path, *, convert: bool, device: str = "cpu") -> None:
        super().__init__(model, Assembly(model, origin.weights), device)
        self.origin = origin
        self.out, self.convert = out, convert
        self.unpacks = convert or (self.assembly.pack is not None and not self.assembly.pack.is_kept)
        self.part = out.with_name(f".{out.name}.part")
        self.journal = Journal(out.with_name(f"{out.name}.journal.jsonl"))
        self._compressed_before = operators_of(model)
        self._lines: dict[str, Line] = {}  # of the journal, by file

    # The journal

    def is_complete(self, request: dict[str, Any]) -> bool:
        """Whether `out` is there already, whole, as it was asked for now."""
        ready = (self.out / "config.json").exists() and not self.part.exists()  # what is in part is newer than out
        self._lines = self._intact(self.out, self.journal.read(request)) if ready else {}
        return len(self._lines) == len(self.shards)

    def begin(self, request: dict[str, Any], walk: Walk, meanwhile: int) -> None:
        """Take up what an earlier walk left, if it was asked for the same, and make sure that the rest fits the disk.

        Args:
            meanwhile: bytes that are needed beside the files while they are made.

        Raises ValueError if it does not fit.
        """
        self._lines = self._intact(self.part, self.journal.read(request)) if self.part.exists() else {}
        missing = [number for number, shard in enumerate(self.shards) if shard.file not in self._lines]
        beside = sum(file.stat().st_size for file in self.origin.beside() if file.name != self.journal.path.name)
        check_space(self.out.parent, meanwhile + beside + sum(self._bytes_of(number, walk) for number in missing))
        self.part.mkdir(parents=True, exist_ok=True)
        for file in self.part.iterdir():
            if file.name not in self._lines:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        self.journal.start(request, self._lines.values())

    def _intact(self, folder: Path, lines: dict[str, Line]) -> dict[str, Line]:
        """The lines whose files are in `folder` as they were written."""
        there = {file: line for file, line in lines.items() if (folder / file).exists()}
        return {file: line for file, line in there.items() if file_hash(folder / file) == line["sha256"]}

    def _bytes_of(self, number: int, walk: Walk) -> int:
        """What the file of one shard will hold, without its header: units are asked for empty operators."""
        costs = {name: c for unit in walk.units if number in unit.blocks for name, c in unit.costs().items()}
        here = [site for site in walk.sites.values() if site.block == number and site.name in walk.chosen]
        opened = {site.name.rpartition(".")[0] for site in here if site.kind == "experts"}
        gone = {*opened, *(site.name for site in here)}
        total = sum(self._copy(name).num_bytes for name in self.shards[number].unknown)
        for making in self.shards[number].makings:
            if not any(inside(target, gone) for target in making.targets):
                total += sum(piece.num_bytes for piece in self._copies(making).values())
        for site in walk.sites.values():
            if site.block == number and site.name in walk.chosen:
                total += costs[site.name].bits // 8 + _bytes_of_bias(site)
            elif site.name.rpartition(".")[0] in opened:  # a dense stack beside one that is compressed
                total += site.weight.numel() * site.weight.dtype.itemsize + _bytes_of_bias(site)
        return total

    @property
    def num_finished(self) -> int:
        return len(self._lines)

    def all_rows(self) -> list[Row]:
        return [row for shard in self.shards for row in self._lines[shard.file]["rows"]]

    # What the walk asks for

    def finished(self, index: int) -> list[Row] | None:
        line = self._lines.get(self.shards[index].file)
        return None if line is None else line["rows"]

    def restore(self, index: int) -> None:
        line = self._lines[self.shards[index].file]
        self._restore_owners()
        here = {name: spec for name, spec in line["operators"].items() if inside(name, [self.root])}
        install_empty(self.model, here)
        self._mark(index, line)
        self._fill(index, here)
        self._take(line, [name for name in self._state(index) if inside(name, here) or line["changed"]])

    def _restore_owners(self) -> None:
        """Those of several blocks, which lie in the file of the last of them, before the first of them is restored."""
        known = dict(outermost(self.model, Owner))
        for line in self._lines.values():
            found = {name: spec for name, spec in line["operators"].items() if not inside(name, [self.root])}
            found = {name: spec for name, spec in found.items() if name not in known}
            install_empty(self.model, found)
            self._take(line, [name for name in self.model.state_dict() if inside(name, found)] if found else [])

    def _take(self, line: Line, names: list[str]) -> None:
        """Read these tensors of the model from a finished file."""
        stored = {self.assembly.stored_name(name): name for name in names}
        for entry in read_header(self.part / line["file"]) if names else ():
            if entry.name in stored:
                set_weight(self.model, stored[entry.name], entry.read().to(self.device))

    def leave(self, index: int, rows: list[Row]) -> None:
        block = f"{self.root}.{index}"
        found = {f"{block}.{name}".rstrip("."): spec for name, spec in operators_of(self.layers[index]).items()}
        found |= {name: owner.spec for name, owner in owners_closed_by(self.model, index).items()}
        operators = {name: spec for name, spec in found.items() if self._compressed_before.get(name) != spec}
        # A block of the architecture that took the place of another has weights of its own.
        mine = self._entered.get(index)
        changed = mine is not None and all(module is not self.layers[index] for module in mine)
        self._write(index, operators, rows, changed=changed and not isinstance(self.layers[index], StandIn))
        self.release(index)

    def finish(self) -> None:
        """Write what is outside the blocks, the index, the config and all other files of the source: the end."""
        rest = len(self.layers)
        if self.shards[rest].file not in self._lines:
            self._write(rest, {}, [])
        for index, shard in enumerate(self.shards[:rest]):
            line, known = self._lines[shard.file], operators_of(self.model)
            install_empty(self.model, {k: spec for k, spec in line["operators"].items() if known.get(k) != spec})
            self._mark(index, line)
        write_index([self.part / shard.file for shard in self.shards], self.part)
        self._write_config()
        self.origin.write_beside(self.part, but=self.journal.path.name)
        shutil.rmtree(self.part / "activations", ignore_errors=True)
        shutil.rmtree(self.out, ignore_errors=True)
        put_in_place(self.part, self.out)

    def _mark(self, index: int, line: Line) -> None:
        if line["changed"]:
            mark_replacement(self.layers[index])

    # Writing

    def _write(self, number: int, operators: dict[str, Any], rows: list[Row], changed: bool = False) -> None:
        shard = self.shards[number]
        new = self._state(number) if number < len(self.layers) else {}
        for name, owner in owners_closed_by(self.model, number).items():
            new |= owner.state_dict(prefix=f"{name}.") if name in operators else {}
        pieces: dict[str, Piece | Entry] = {name: self._copy(name) for name in shard.unknown}
        for making, kept in self._kept(number, operators):
            if kept == making.targets and not changed:
                pieces |= self._copies(making)
                for target in kept:
                    new.pop(target, None)
        pieces |= {self.assembly.stored_name(name): Piece.of(tensor) for name, tensor in new.items()}
        size, digest = write_shard(self.part / shard.file, pieces)
        line = {"file": shard.file, "bytes": size, "sha256": digest, "operators": operators, "rows": rows}
        line["changed"] = changed
        self.journal.append(line)
        self._lines[shard.file] = line

    def _copies(self, making: Making) -> dict[str, Piece | Entry]:
        """The tensors on disk of a making as they are, or in the dtype of the model where that was asked for."""
        if not self.unpacks:
            return {name: self._copy(name) for name in making.sources}
        return self.assembly.converted(making)

    def _copy(self, name: str) -> Piece | Entry:
        return passed_on(self.assembly.weights, self.entries[name])

    def _write_config(self) -> None:
        """The config of the source, with the operators in it."""
        config = dict(self.origin.config)
        packed = packed_config(self.assembly.config)
        if packed is not None and self.unpacks:
            config.pop("quantization_config")  # nothing is packed any more
        if operators_of(self.model) or fitted_blocks(self.model):
            attach(self.model)
            made = {**self.model.config.quantization_config.to_dict(), "packed": None if self.unpacks else packed}
            config["quantization_config"] = {key: value for key, value in made.items() if value is not None}
        if self.convert or not (config.get("dtype") or config.get("torch_dtype")):
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.model.dtype).removeprefix("torch.")
        write_json(self.part / "config.json", config)


def _bytes_of_bias(site: Site) -> int:
    return 0 if site.kind == "block" or site.bias is None else site.bias.numel() * site.weight.dtype.itemsize
