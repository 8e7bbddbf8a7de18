"""Stopped at any moment, the same call goes on at the first unfinished block and ends with the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamed import BATCHES, PLANS, hashes, leftovers, save_dense, stop_at
from tensormix.compression import to_files as disk
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.compression.fitting import replace
from tensormix.methods import Mixt, SvdLlm
from tensormix.plan import Plan, Rule
from tensormix.storage.safetensors import file_hash
from zoo import NUM_BLOCKS, make


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_dense(tmp_path / "dense")


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_interrupted_and_taken_up_again(tmp_path, folder, plan):
    expected = compress_checkpoint(folder, tmp_path / "straight", plan, BATCHES)
    for number in sorted({min(number, len(expected)) for number in (1, 2, 8, 9, 14)}):
        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(folder, out, plan, BATCHES, stop_at(number))
        assert not out.exists()
        rows = compress_checkpoint(folder, out, plan, BATCHES)
        assert [row["relative_error"] for row in rows] == [row["relative_error"] for row in expected]
        assert hashes(out) == hashes(tmp_path / "straight")
        assert [name for name in leftovers(tmp_path) if str(number) in name] == [out.name, f"{out.name}.journal.jsonl"]


def test_finished_blocks_are_not_fitted_again(tmp_path, folder, monkeypatch):
    fitted = []
    monkeypatch.setattr(
        "tensormix.compression.walk.replace", lambda unit, *a: fitted.append(unit.name) or replace(unit, *a)
    )
    plan = PLANS["calibrated"]
    with pytest.raises(KeyboardInterrupt):  # the dropped block is the eighth; its file is not written then
        compress_checkpoint(folder, tmp_path / "out", plan, BATCHES, stop_at(8))
    assert len(fitted) == 8
    fitted.clear()
    compress_checkpoint(folder, tmp_path / "out", plan, BATCHES)
    assert len(fitted) == 8 and fitted[0] == "model.layers.1" and "layers.0." not in str(fitted)
    fitted.clear()
    compress_checkpoint(folder, tmp_path / "out", plan, BATCHES)  # it is complete: nothing is left to do
    assert fitted == []


@pytest.mark.parametrize(
    "change",
    [{"dtype": "bfloat16"}, {"asked": "more"}, {"plan": PLANS["calibrated"]}],
    ids=lambda change: next(iter(change)),
)
def test_another_request_starts_again(tmp_path, folder, change):
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"], BATCHES, stop_at(15))
    request = {"plan": PLANS["weights_only"], **change}
    compress_checkpoint(folder, tmp_path / "straight", batches=BATCHES, **request)
    compress_checkpoint(folder, tmp_path / "out", batches=BATCHES, **request)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_finished_file_that_is_damaged_is_made_again(tmp_path, folder, damage):
    plan = PLANS["weights_only"]
    compress_checkpoint(folder, tmp_path / "straight", plan)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(folder, tmp_path / "out", plan, progress=stop_at(15))
    file = tmp_path / ".out.part" / f"model-00001-of-0000{NUM_BLOCKS + 1}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    {"cut": lambda: file.write_bytes(content[:-9]), "flipped": lambda: file.write_bytes(content), "gone": file.unlink}[
        damage
    ]()
    compress_checkpoint(folder, tmp_path / "out", plan)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


def test_a_torn_line_of_the_journal_is_as_good_as_none(tmp_path, folder):
    plan = PLANS["weights_only"]
    compress_checkpoint(folder, tmp_path / "straight", plan)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(folder, tmp_path / "out", plan, progress=stop_at(15))
    journal = tmp_path / "out.journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    compress_checkpoint(folder, tmp_path / "out", plan)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")
    assert len([json.loads(line) for line in journal.read_text().splitlines()]) == 1 + NUM_BLOCKS + 1


def test_the_journal_holds_the_hash_of_every_file(tmp_path, folder):
    compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"])
    lines = [json.loads(line) for line in (tmp_path / "out.journal.jsonl").read_text().splitlines()[1:]]
    written = {file.name: file_hash(file) for file in (tmp_path / "out").glob("*.safetensors")}
    assert {line["file"]: line["sha256"] for line in lines} == written


def test_an_older_model_is_not_taken_for_the_new_one(tmp_path, folder, monkeypatch):
    """Stopped between the last line of the journal and the renaming, with a model of another plan at `out`."""
    compress_checkpoint(folder, tmp_path / "straight", PLANS["weights_only"])
    compress_checkpoint(folder, tmp_path / "out", PLANS["calibrated"], BATCHES)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"], overwrite=True)
    compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"], overwrite=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


def test_a_complete_model_that_was_damaged_is_made_again(tmp_path, folder):
    compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"])
    expected = hashes(tmp_path / "out")
    file = tmp_path / "out" / f"model-00002-of-0000{NUM_BLOCKS + 1}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    compress_checkpoint(folder, tmp_path / "out", PLANS["weights_only"], overwrite=True)
    assert hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_experts_taken_up_again(tmp_path, family):
    """The dense stream runs through opened experts, and a stack beside one that was compressed before is compressed."""
    make(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    both = Plan((Rule(method=SvdLlm(keep=0.5, update=True), blocks="1-2"),))
    up = Plan((Rule(method=Mixt(num_branches=2), blocks="1-2", sites=("gate_up",)),))
    down = Plan((Rule(method=Mixt(num_branches=2), blocks="1-2", sites=("down",)),))
    compress_checkpoint(tmp_path / "dense", tmp_path / "up", up)
    for source, plan in ((tmp_path / "dense", both), (tmp_path / "up", down)):
        rows = compress_checkpoint(source, tmp_path / "straight", plan, BATCHES, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(source, tmp_path / "out", plan, BATCHES, stop_at(len(rows)), overwrite=True)
        compress_checkpoint(source, tmp_path / "out", plan, BATCHES, overwrite=True)
        assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")


KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tensormix.compression.checkpoint import compress_checkpoint
from streamed import BATCHES, PLANS

def kill_again_and_again(folder, out, plan):
    compress_checkpoint(folder, out.with_name(f"first-{out.name}"), plan, BATCHES)  # imports, too
    began = time.perf_counter()
    compress_checkpoint(folder, out.with_name(f"timed-{out.name}"), plan, BATCHES)
    needed = time.perf_counter() - began
    chance, killed = random.Random(0), 0
    for attempt in range(50):
        child = os.fork()
        if not child:
            compress_checkpoint(folder, out, plan, BATCHES)
            os._exit(0)
        # The first two early, so that a machine that was busy while it was timed does not finish before them.
        time.sleep(needed * (chance.uniform(0.05, 0.3) if attempt < 2 else chance.uniform(0.2, 0.7 + 0.1 * attempt)))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        killed += 1
    assert os.path.exists(out / "config.json"), "never finished"
    return killed

folder = Path(sys.argv[1])
print(*(kill_again_and_again(folder, folder.with_name(plan), PLANS[plan]) for plan in sys.argv[2:]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills child processes of its own")
def test_killed_at_random_moments(tmp_path):
    """SIGKILL, again and again, until one attempt gets through."""
    folder, plans = tmp_path / "dense", ("weights_only", "calibrated")
    make("llama", num_hidden_layers=12).save_pretrained(folder)
    here = Path(__file__).parents[1]
    paths = os.pathsep.join([str(here), str(here.parent / "src")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(folder), *plans],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert all(int(killed) >= 2 for killed in done.stdout.split()[-2:]), "hardly ever killed: the test says nothing"
    for plan in plans:
        assert hashes(tmp_path / plan) == hashes(tmp_path / f"first-{plan}")
