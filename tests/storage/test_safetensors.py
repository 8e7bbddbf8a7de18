"""Safetensors read and written tensor by tensor, and what is said about files that are wrong."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tensormix.storage.entries import DTYPES, Piece
from tensormix.storage.formats import open_weights
from tensormix.storage.memory import check_space
from tensormix.storage.safetensors import INDEX, file_hash, read_header, write_shard

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {str(dtype): torch.randn(3, 5, generator=generator).to(dtype) for dtype in FLOATS}
    return {**made, "bytes": torch.arange(7, dtype=torch.uint8), "one": torch.tensor(2.5), "none": torch.empty(0, 4)}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture
def folder(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """Two files and an index."""
    for file, names in (("a.safetensors", ("x", "y")), ("b.safetensors", ("z",))):
        save_file({name: torch.ones(4) for name in names}, tmp_path / file)
    write_index(tmp_path, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    return tmp_path


def write_index(folder, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_what_the_reference_library_wrote_is_read(folder):
    entries = open_weights(folder).entries
    assert entries.keys() == tensors().keys()
    for name, tensor in tensors().items():
        read = entries[name].read()
        assert read.dtype == tensor.dtype and read.shape == tensor.shape and as_bytes(read) == as_bytes(tensor)
        assert b"".join(entries[name].chunks()) == as_bytes(tensor)


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(FLOATS)), min_size=1, max_size=6)
)
def test_what_is_written_the_reference_library_reads(shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    made = {f"t{n}": torch.randn(shape).to(dtype) for n, (shape, dtype) in enumerate(shapes)}
    size, digest = write_shard(path, {name: Piece.of(tensor) for name, tensor in made.items()})
    assert size == path.stat().st_size and digest == file_hash(path)
    read = load_file(path)
    assert read.keys() == made.keys()
    assert all(as_bytes(read[name]) == as_bytes(made[name]) and read[name].shape == made[name].shape for name in made)


def test_entries_pass_through_byte_for_byte_whatever_they_hold(folder, tmp_path):
    """Even a dtype that torch does not have."""
    header = {"odd": {"dtype": "F6_E3M2", "shape": [4], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"abc")
    entry = open_weights(folder).entries["odd"]
    with pytest.raises(ValueError, match="odd has the dtype F6_E3M2, which cannot be read here"):
        entry.read()
    out = tmp_path / "out" / "model.safetensors"
    write_shard(out, {"odd": entry, "plain": Piece.of(torch.ones(2))})
    again = {entry.name: entry for entry in read_header(out)}
    assert b"".join(again["odd"].chunks()) == b"abc" and again["odd"].dtype == "F6_E3M2"
    assert torch.equal(again["plain"].read(), torch.ones(2))


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(folder):
    before = file_hash(folder / "model.safetensors")
    tensor = open_weights(folder).entries["torch.float32"].read()
    tensor.zero_()
    assert not tensor.any() and file_hash(folder / "model.safetensors") == before


def test_a_write_that_fails_leaves_nothing(folder, tmp_path):
    def broken():
        yield b"abc"
        raise OSError("no more")

    path = tmp_path / "out" / "model.safetensors"
    with pytest.raises(OSError, match="no more"):
        write_shard(path, {"x": Piece("U8", (6,), broken)})
    assert not list(path.parent.iterdir())


def test_a_cut_file_names_the_tensor(folder):
    file = folder / "model.safetensors"
    last = max(read_header(file), key=lambda entry: entry.stop)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"model.safetensors is damaged or cut off \({last.name} ends at byte {last.stop}, and the"
    ):
        open_weights(folder)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 10**15) + b"{}", struct.pack("<Q", 4) + b"[1,2"])
def test_a_damaged_header(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut off \(.*header.*\); fetch it again"):
        open_weights(folder)


def test_bytes_and_shape_that_disagree(folder):
    text = json.dumps({"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(ValueError, match=r"x has 12 bytes, not those of its shape \(2, 2\) in F32"):
        open_weights(folder)


def test_a_sharded_checkpoint(sharded):
    checkpoint = open_weights(sharded)
    assert {name: entry.file.name for name, entry in checkpoint.entries.items()} == {
        "x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"
    }  # fmt: skip
    assert sum(map(checkpoint.bits, checkpoint.entries.values())) == 3 * 16 * 8


def test_a_missing_shard(sharded):
    (sharded / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"b.safetensors is missing, but {INDEX} names it"):
        open_weights(sharded)


def test_an_index_that_lists_a_tensor_that_is_not_there(sharded):
    write_index(sharded, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors", "q": "b.safetensors"})
    with pytest.raises(ValueError, match=rf"b.safetensors does not hold q, but {INDEX} says so: they disagree"):
        open_weights(sharded)


def test_an_index_that_puts_a_tensor_elsewhere(sharded):
    write_index(sharded, {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    with pytest.raises(ValueError, match=rf"a.safetensors holds x, but {INDEX} has it in b.safetensors: they disagree"):
        open_weights(sharded)


def test_an_index_that_leaves_a_tensor_out(sharded):
    write_index(sharded, {"x": "a.safetensors", "z": "b.safetensors"})
    with pytest.raises(ValueError, match=rf"a.safetensors holds y, but {INDEX} has it nowhere: they disagree"):
        open_weights(sharded)


@pytest.mark.parametrize("content", ["{}", "[1]", '{"weight_map": ["x"]}', '{"weight_map": {"x": 3}}'])
def test_an_index_without_a_weight_map(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"{INDEX} has no weight_map that says which tensor is in which file"):
        open_weights(sharded)


def test_files_that_no_index_puts_in_order(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"has a.safetensors, but neither model.safetensors nor {INDEX}"):
        open_weights(sharded)


def test_too_little_disk(tmp_path):
    with pytest.raises(ValueError, match=r"has .* GB free, and 1000000.00 GB are needed; nothing was written"):
        check_space(tmp_path / "not" / "yet" / "there", 10**15)
    check_space(tmp_path, 1)


def test_every_dtype_has_the_size_it_says():
    for name, dtype in DTYPES.items():
        bits = int("".join(c for c in name.split("_")[0] if c.isdigit()) or 8)
        assert dtype.itemsize * 8 == bits
