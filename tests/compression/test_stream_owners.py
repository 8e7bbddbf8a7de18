"""Owners written block by block: one inside a block with it, one of several blocks with the last of them."""

from __future__ import annotations

import pytest
import torch

from owners import SharedBasis, across, attention, share
from plans import plan_of
from streamed import hashes, save_dense, stop_at
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.compression.walk import Walk
from tensormix.methods import Svd
from tensormix.models import load_model
from tensormix.operators import OPERATORS, Dense, View, connect
from tensormix.sites import cost_of, install
from tensormix.sites.installing import install_owners
from tensormix.storage.formats import open_weights
from zoo import token_ids

SPAN = across(blocks=(1, 2, 3))
PLAN = plan_of(
    {"method": Svd(keep=0.5), "sites": ["gate"], "blocks": "1-3"},
    {"method": Svd(keep=0.5), "sites": ["q", "k", "v", "o"], "blocks": "0"},
)


def fit(walk, part, _stats):
    """Stands for methods that share: block 0 within its attention, blocks 1 to 3 a basis of their gates."""
    (index,) = part
    if index == 0:
        share(walk.model, attention(0))
    elif not hasattr(walk.model.model, "basis"):  # the first of the three, or the first after a stop
        views = dict(zip(SPAN, drawn().views("basis").values(), strict=True))
        install_owners(walk.model, views)
        for name, view in views.items():
            if not isinstance(walk.model.get_submodule(name), View):
                install(walk.model, name, view)
        assert connect(walk.model) == []
    return walk._count([{"site": name, "block": index} for unit in walk.units_in(part) for name in [unit.name]])


def drawn():
    generator = torch.Generator().manual_seed(0)
    basis, *cores = (torch.randn(shape, generator=generator) / 8 for shape in ((8, 32), (48, 8), (48, 8), (48, 8)))
    parts = {str(number): Dense.from_dense(core) for number, core in enumerate(cores)}
    return SharedBasis(basis=Dense.from_dense(basis), cores=parts)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(OPERATORS, "SharedBasis", SharedBasis)
    monkeypatch.setattr(Walk, "_fit", fit)


def test_streamed_and_taken_up_again_to_the_byte(tmp_path):
    folder = save_dense(tmp_path / "dense")
    model = load_model(folder)
    compress(model, PLAN)
    compress_checkpoint(folder, tmp_path / "straight", PLAN)
    again = load_model(tmp_path / "straight")
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits) and cost_of(again) == cost_of(model)
    for number in (4, 5, 6, 7):  # after block 0, 1, 2 and 3
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(folder, tmp_path / f"out{number}", PLAN, None, stop_at(number))
        compress_checkpoint(folder, tmp_path / f"out{number}", PLAN)
        assert hashes(tmp_path / f"out{number}") == hashes(tmp_path / "straight")


def test_each_owner_lies_once_in_the_file_of_its_last_block(tmp_path):
    folder = save_dense(tmp_path / "dense")
    compress_checkpoint(folder, tmp_path / "out", PLAN)
    places = {name: entry.file.name[:11] for name, entry in open_weights(tmp_path / "out").entries.items()}
    shared = {name: place for name, place in places.items() if "basis" in name}
    assert {place for name, place in shared.items() if name.startswith("model.basis.")} == {"model-00004"}
    assert {place for name, place in shared.items() if "self_attn" in name} == {"model-00001"}
