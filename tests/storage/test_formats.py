"""A second format is one class and one line of the table: nothing else changes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import ModelSource, fingerprint, load_model, skeleton
from tensormix.plan import Plan
from tensormix.storage.entries import Entry
from tensormix.storage.formats import FORMATS, files_beside, open_weights
from zoo import logits, make, token_ids

PLAN = Plan.model_validate([{"blocks": "1,2", "method": {"name": "svd", "keep": 0.5}}])
SCALES = "scale"


class Npy:
    """A folder of .npy files. Matrices are one byte a number, with one scale for all that stands before them."""

    file_patterns = ("*.npy",)
    index_patterns = ()
    described = None

    def __init__(self, folder, file=None):
        self.folder, self.files = folder, sorted(folder.glob("*.npy")) if file is None else [file]
        self.entries = {file.stem: self._entry(file) for file in self.files}

    def _entry(self, file):
        stored = np.load(file, mmap_mode="r")
        shape = stored.shape if stored.dtype == np.float32 else (stored.shape[0], stored.shape[1] - 4)
        size = file.stat().st_size
        return Entry(file.stem, file, "F32", shape, size - stored.nbytes, size, is_plain=stored.dtype == np.float32)

    def read(self, entry):
        if entry.is_plain:
            return entry.read()
        stored = torch.from_numpy(np.load(entry.file))  # (O, I + 4): codes, and before each row its scale in fp32
        return stored[:, 4:].float() * stored[:, :4].contiguous().view(torch.float32)

    def bits(self, entry):
        return 8 * entry.num_bytes


def write_npy(folder, name, tensor):
    if tensor.dim() != 2:
        return np.save(folder / name, tensor.numpy())
    scale = tensor.abs().amax(1, keepdim=True) / 127
    codes = (tensor / scale).round().to(torch.int8)
    return np.save(folder / name, torch.cat([scale.view(torch.int8), codes], dim=1).numpy())


@pytest.fixture
def npy(tmp_path, monkeypatch):
    """The same model twice: as .npy files, and what they hold as safetensors."""
    monkeypatch.setitem(FORMATS, "npy", Npy)
    make("qwen3").save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "npy", ignore=shutil.ignore_patterns("*.safetensors*"))
    (tmp_path / "npy" / "notes.txt").write_text("beside")
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        write_npy(tmp_path / "npy", name, tensor)
    numbers = open_weights(tmp_path / "npy")
    loaded = load_model(tmp_path / "plain")
    with torch.no_grad():
        for name, entry in numbers.entries.items():
            loaded.get_parameter(name).copy_(numbers.read(entry))
    loaded.save_pretrained(tmp_path / "plain")
    return tmp_path / "npy", tmp_path / "plain"


def test_a_skeleton_and_the_model_of_another_format(npy):
    folder, plain = npy
    bare, model, expected = skeleton(folder), load_model(folder), load_model(plain)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert torch.equal(logits(model), logits(expected))
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {p.dtype for p in load_model(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_another_format_is_compressed_block_by_block(npy, tmp_path):
    """What is left alone is written as the plain numbers that it stands for."""
    folder, plain = npy
    rows = compress_checkpoint(folder, tmp_path / "out", PLAN)
    model = load_model(plain)
    expected = compress(model, PLAN)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))
    assert [row["parameters"] for row in rows] == [row["parameters"] for row in expected]
    stored = {row["site"]: row["dense_bits"] for row in rows}
    assert stored["model.layers.1.mlp.up_proj"] == 8 * 48 * (32 + 4), "codes and scales, not floats"
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".safetensors", ".json", ".txt"}


def test_a_model_of_another_format_is_counted_as_it_is_stored(npy):
    source = ModelSource(npy[0])
    files = {file: np.load(file).nbytes for file in npy[0].glob("*.npy")}
    assert source.stored_bits == 8 * sum(files.values())
    assert fingerprint(npy[0]) != fingerprint(npy[1])
    assert [file.name for file in files_beside(npy[0]) if file.suffix == ".txt"] == ["notes.txt"]


def test_a_wrong_tensor_of_another_format_is_named(npy):
    np.save(npy[0] / "model.norm.weight.npy", np.ones(7, dtype=np.float32))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has the shape \(7,\), but config.json implies \(32,\)"):
        load_model(npy[0])


@torch.no_grad()
def test_calibrated_blocks_of_another_format(npy, tmp_path):
    plan = Plan.model_validate([{"blocks": "last 1", "method": {"name": "svd_llm", "keep": 0.5}}])
    compress_checkpoint(npy[0], tmp_path / "out", plan, [token_ids(seed=1)])
    model = load_model(npy[1])
    compress(model, plan, [token_ids(seed=1)])
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))
